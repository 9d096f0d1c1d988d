"""Preparation: real datatrove pipelines on a small corpus with planted duplicates, near duplicates and junk."""

import fcntl
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from tokenizers import Tokenizer

pytest.importorskip("datatrove")

from data_scheduler import DataConfig, Scheduler
from data_scheduler.prep.config import LocalExecutor, PrepConfig
from data_scheduler.prep.load import load_prep_config
from data_scheduler.prep.local import run_passes
from data_scheduler.prep.plan import Pass
from data_scheduler.prep.run import prepare
from headrace.errors import ConfigError, DataError

STOP_WORDS = ["the", "of", "and", "to", "with", "that"]
ROOT = Path(__file__).parents[2]


def page(seed: object, words: int = 150) -> str:
    """Prose as far as a filter can tell: sentences of made-up words and stop words."""
    rng = random.Random(f"page {seed}")
    syllables = ["ra", "mil", "lo", "stre", "gan", "tor", "wei", "sa", "dun", "pel"]
    made = ["".join(rng.choices(syllables, k=rng.randint(2, 3))) for _ in range(words)]
    tokens = [rng.choice(STOP_WORDS) if rng.random() < 0.3 else word for word in made]
    lines = [" ".join(tokens[at : at + 10]).capitalize() + "." for at in range(0, words, 10)]
    return "\n".join(" ".join(lines[at : at + 5]) for at in range(0, len(lines), 5))


def near(text: str) -> str:
    """The same page with two words changed."""
    words = text.split(" ")
    return " ".join("weir" if at in (30, 32) else word for at, word in enumerate(words))


GOOD = {f"good-{number}": page(number, 120 + 10 * (number % 5)) for number in range(24)}
SHORT = {f"short-{number}": page(f"short {number}", 20) for number in range(3)}
SYMBOLS = {"symbols-0": " # ".join(page("symbols").split(" "))}
REPEATED = {f"repeated-{number}": "\n".join([page(f"repeated {number}", 30)] * 8) for number in range(2)}
COPIES = {f"copy-{number}": GOOD[f"good-{number}"] for number in (1, 2, 2, 9)} | {"copy-2b": GOOD["good-2"]}
NEAR = {f"near-{number}": near(GOOD[f"good-{number}"]) for number in (4, 5, 15)}
PLANTED = {**GOOD, **SHORT, **SYMBOLS, **REPEATED, **COPIES, **NEAR}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted documents in three files of three formats, and four records that cannot be read."""
    root = tmp_path_factory.mktemp("raw")
    names = sorted(PLANTED, key=lambda name: hashlib.sha256(name.encode()).digest())
    rows = [
        {"id": name, "text": PLANTED[name], "rank": f"../{name}", "year": 2000 + at} for at, name in enumerate(names)
    ]
    lines = [json.dumps(row) for row in rows]
    bad = ["{torn", '{"id": "x"}', '{"id": "y", "text": "  "}']
    (root / "a.jsonl").write_text("\n".join([*lines[:14], *bad]) + "\n")
    (root / "b.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines[14:26]).encode()))
    table = pa.Table.from_pylist([*rows[26:], {"id": "z", "text": None, "rank": "", "year": 0}])
    pq.write_table(table, root / "c.parquet", row_group_size=5)
    return root


@pytest.fixture
def settings(raw: Path, corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """A configuration with every kind of pass."""
    return make_settings(raw, corpus, tmp_path / "out")


def make_settings(raw: Path, corpus: Path, out: Path) -> dict[str, Any]:
    return {
        "input": {"paths": [str(raw)], "keep": {"rank": "text", "year": "integer"}},
        "steps": [
            {"kind": "gopher_quality"},
            {"kind": "gopher_repetition"},
            {"kind": "exact_dedup"},
            {"kind": "minhash_dedup"},
            {"kind": "tokens", "tokenizer": str(corpus / "tokenizer.json")},
            {"kind": "length"},
            {"kind": "compression"},
            {"kind": "rare_words", "frequent": 100},
        ],
        "out": str(out),
        "keep_removed": True,
        "executor": {"kind": "local", "workers": 1},
    }


@pytest.fixture(scope="module")
def prepared(raw: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the whole configuration, made once."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(PrepConfig.model_validate(make_settings(raw, corpus, out)))
    return out


def run(settings: dict[str, Any]) -> dict[str, Any]:
    report = prepare(PrepConfig.model_validate(settings)).report
    assert report is not None
    return report


def output(out: Path) -> dict[str, dict[str, Any]]:
    """Rows of the output by id."""
    rows = [row for path in sorted((out / "data").glob("*")) for row in rows_of(path)]
    return {row["id"]: row for row in rows}


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [
        json.loads(line) for line in zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read().splitlines()
    ]


def removed(out: Path, step: str) -> set[str]:
    return {row["id"] for path in (out / "removed" / step).glob("*") for row in rows_of(path)}


def contents(out: Path) -> dict[str, bytes]:
    """Everything a preparation gives, but what it needs for resuming."""
    paths = [path for path in out.rglob("*") if path.is_file() and "work" not in path.relative_to(out).parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths if path.name != "prep.json"}


# -- what is removed ------------------------------------------------------------------------------------------------


def test_each_step_removes_what_was_planted_for_it(prepared: Path) -> None:
    assert removed(prepared, "0-gopher_quality") == set(SHORT) | set(SYMBOLS)
    assert removed(prepared, "1-gopher_repetition") == set(REPEATED)
    left = output(prepared)
    gone = removed(prepared, "2-exact_dedup")
    twins = [{name for name, text in PLANTED.items() if text == GOOD[f"good-{number}"]} for number in (1, 2, 9)]
    assert all(len(group & gone) == len(group) - 1 for group in twins)
    assert gone <= set.union(*twins)
    gone |= removed(prepared, "3-minhash_dedup")
    pairs = [{f"good-{number}", f"near-{number}"} for number in (4, 5, 15)]
    assert all(len(pair & gone) == 1 for pair in pairs)
    assert len(left) == len(GOOD)
    assert {row["text"] for row in left.values()} <= set(GOOD.values()) | set(NEAR.values())


def test_documents_in_are_documents_out_and_removed(prepared: Path, raw: Path) -> None:
    report = json.loads((prepared / "prep_report.json").read_text())
    removed_by = {step["step"]: step["documents_removed"] for step in report["steps"]}
    assert list(removed_by.values()) == [4, 2, 4, 3, 0, 0, 0, 0]
    assert report["records"] == len(PLANTED) + 4
    assert report["records"] == report["rejected"] + sum(removed_by.values()) + report["documents"]
    assert report["steps"][0]["reasons"] == {"gopher_short_doc": 3, "gopher_too_many_hashes": 1}
    for step in removed_by:
        assert len(removed(prepared, step)) == removed_by[step]
    assert report["chars"] == sum(row["chars"] for row in output(prepared).values())
    rejects = [json.loads(line) for line in (prepared / "rejects.jsonl").read_text().splitlines()]
    assert [(Path(reject["file"]).name, reject["record"]) for reject in rejects] == [
        ("a.jsonl", 14), ("a.jsonl", 15), ("a.jsonl", 16), ("c.parquet", len(PLANTED) - 26)
    ]  # fmt: skip
    assert [reject["reason"].split(":")[0] for reject in rejects] == [
        "not valid JSON", "field 'text' is missing", "field 'text' is empty", "field 'text' is missing"
    ]  # fmt: skip


def test_records_do_not_choose_where_they_are_written(prepared: Path) -> None:
    assert {path.name for path in (prepared / "data").iterdir()} == {f"0000{n}.parquet" for n in range(3)}
    assert {path.name for path in prepared.iterdir()} == {
        "data", "removed", "work", "prep.json", "prep_report.json", "rejects.jsonl"
    }  # fmt: skip
    assert all(row["rank"] == f"../{name}" for name, row in output(prepared).items())


# -- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_what_they_say(prepared: Path, corpus: Path) -> None:
    rows = output(prepared)
    counts: Counter[str] = Counter()
    for row in rows.values():
        counts.update(re.findall(r"\w+", row["text"].lower()))
    frequent = set(sorted(counts, key=lambda word: (-counts[word], word))[:100])
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    for row in rows.values():
        text, words = row["text"], re.findall(r"\w+", row["text"].lower())
        assert row["chars"] == len(text)
        assert row["tokens"] == len(tokenizer.encode(text, add_special_tokens=False).ids)
        assert row["compression_ratio"] == len(zlib.compress(text.encode(), 6)) / len(text.encode())
        assert row["rare_word_share"] == sum(word not in frequent for word in words) / len(words)
        assert 0 < row["rare_word_share"] < 1


def test_a_scheduler_filters_on_scores(prepared: Path, corpus: Path) -> None:
    rows = output(prepared)
    middle = sorted(row["compression_ratio"] for row in rows.values())[len(rows) // 2]
    where = f"compression_ratio > {middle!r} and tokens < 100000"
    wanted = {row["text"] for row in rows.values() if row["compression_ratio"] > middle}
    config = {
        "tokenizer": str(corpus / "tokenizer.json"),
        "sources": [{"name": "prepared", "paths": [str(prepared / "data")], "where": where}],
        "seq_len": 64, "global_batch_size": 4, "lanes": 1, "prefetch": 0,
    }  # fmt: skip
    scheduler = Scheduler(DataConfig.model_validate(config))
    tokens = [scheduler.encoder.encode(text).tolist() for text in wanted]
    total = sum(map(len, tokens)) + len(tokens)
    batches = itertools.islice(scheduler, total // (65 * 4))  # less than an epoch
    seen = scheduler.encoder.decode(list(itertools.chain(*(batch.tokens.ravel().tolist() for batch in batches))))
    documents = [document for document in seen.split("<|endoftext|>")[:-1] if document]
    assert 5 < len(documents) <= len(wanted)
    assert set(documents) <= wanted


# -- always the same bytes ------------------------------------------------------------------------------------------


def headrace(config: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", "data", "prep", str(config)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_killed_and_resumed_with_more_workers_gives_the_same_bytes(
    settings: dict[str, Any], prepared: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "prep.yaml", Path(settings["out"])
    path.write_text(yaml.safe_dump(settings))
    process = headrace(path, PYTHONHASHSEED="1")
    while not (out / "work" / "00-read" / "completions" / "00000").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "prep_report.json").exists()
    path.write_text(yaml.safe_dump(settings | {"executor": {"kind": "local", "workers": 3}}))
    process = headrace(path, PYTHONHASHSEED="2")
    printed, notes = process.communicate()
    assert process.returncode == 0, notes
    assert re.search(r"^pass 1/9 read: 3 tasks, \d done before$", notes, re.MULTILINE)
    assert "Traceback" not in notes
    assert re.search(r"2-exact_dedup +│ 31 +│ 4", printed)
    assert contents(out) == contents(prepared)


def test_a_finished_preparation_is_not_done_again(prepared: Path, raw: Path, corpus: Path) -> None:
    before = contents(prepared)
    config = PrepConfig.model_validate(make_settings(raw, corpus, prepared))
    assert prepare(config).was_done
    assert contents(prepared) == before


def test_another_configuration_or_input_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"text": page(0)}) + "\n")
    settings = {"input": {"paths": [str(folder)]}, "steps": [{"kind": "gopher_quality"}], "out": settings["out"]}
    run(settings)
    with pytest.raises(ConfigError, match=r"begun with other configuration \(steps.0.min_doc_words differs\)"):
        run(settings | {"steps": [{"kind": "gopher_quality", "min_doc_words": 20}]})
    (folder / "b.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"begun with other input files \(.*b.jsonl differs\)"):
        run(settings)
    (folder / "b.jsonl").unlink()
    (Path(settings["out"]) / "data" / "00000.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"00000.parquet is not what was written"):
        run(settings)
    with pytest.raises(ConfigError, match="holds something else"):
        run(settings | {"out": str(folder)})


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    settings = small(tmp_path, {"a": page(0)}, [{"kind": "length"}])
    run(settings)
    (tmp_path / "out" / "prep_report.json").unlink()
    with open(tmp_path / "out" / "prep.json", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is being prepared by another process"):
            run(settings)


class Killed:
    """A block that does not survive its second task."""

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_killed_for_memory_is_noticed(tmp_path: Path) -> None:
    passes = [Pass("00-read", 3, [Killed()], str(tmp_path))]
    with pytest.raises(DataError, match="pass 1/1 read: a worker was killed, most likely for memory"):
        run_passes(passes, LocalExecutor(workers=2))
    assert not (tmp_path / "completions" / "00001").exists()


# -- other steps ----------------------------------------------------------------------------------------------------


def small(tmp_path: Path, documents: dict[str, str], steps: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Settings for a corpus of one file, to jsonl."""
    (tmp_path / "in").mkdir(exist_ok=True)
    lines = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in documents.items())
    (tmp_path / "in" / "0.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return {
        "input": {"paths": [str(tmp_path / "in")]},
        "steps": steps,
        "out": str(tmp_path / "out"),
        "output_format": "jsonl",
        "keep_removed": True,
        "executor": {"kind": "local", "workers": 1},
        **more,
    }


def test_c4_fineweb_and_sentences(tmp_path: Path) -> None:
    menu = "\n".join(f"item {number}" for number in range(60))
    shared = " ".join(page("shared", 60).split("\n"))
    documents = {
        "plain": page("p"),
        "code": page("code") + "\nif (x) { y(); }.",
        "cookies": page("cookies") + "\nThis site uses cookies for you.",
        "menu": page("m", 20) + "\n" + menu,
        "first": page("first") + "\n" + shared,
        "second": page("second") + "\n" + shared,
    }
    steps = [{"kind": "fineweb_quality"}, {"kind": "c4"}, {"kind": "exact_dedup", "unit": "sentences"}]
    run(small(tmp_path, documents, steps))
    out = tmp_path / "out"
    assert removed(out, "0-fineweb_quality") == {"menu"}
    assert removed(out, "1-c4") == {"code"}
    left = output(out)
    assert set(left) == {"plain", "cookies", "first", "second"}
    assert left["cookies"]["text"] == documents["cookies"].removesuffix("\nThis site uses cookies for you.")
    assert left["first"]["text"] == documents["first"]
    assert left["second"]["text"].strip() == page("second")


def test_a_language_model_given_by_path_decides(tmp_path: Path) -> None:
    fasttext = pytest.importorskip("fasttext")
    german = ["der müller und das rad", "die schleuse ist zu", "wasser fließt über das wehr", "und der bach"]
    english = ["the miller and the wheel", "the sluice is shut", "water flows over the weir", "and the brook"]
    lines = [f"__label__{name} {text}" for name, texts in (("de", german), ("en", english)) for text in texts * 20]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    model = fasttext.train_supervised(str(tmp_path / "train.txt"), dim=8, epoch=30, lr=1.0, thread=1, verbose=0)
    model.save_model(str(tmp_path / "lid.bin"))
    documents = {"de": "\n".join(german), "en": "\n".join(english)}
    step = {"kind": "language", "model": str(tmp_path / "lid.bin"), "languages": ["de"]}
    run(small(tmp_path, documents, [step]))
    row = output(tmp_path / "out")["de"]
    assert set(output(tmp_path / "out")) == {"de"}
    assert row["language"] == "de"
    assert row["language_score"] > 0.65
    assert removed(tmp_path / "out", "0-language") == {"en"}


def test_text_files_damaged_files_and_names_without_ids(tmp_path: Path) -> None:
    settings = small(tmp_path, {}, [{"kind": "length"}], executor={"kind": "local"})
    folder = tmp_path / "in"
    (folder / "1.txt").write_text("a mill")
    (folder / "2.txt").write_bytes(b"\xff")
    whole = gzip.compress("".join(json.dumps({"text": page(number)}) + "\n" for number in range(50)).encode())
    (folder / "3.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "4.parquet").write_bytes(b"no")
    report = run(settings)
    names = list(output(tmp_path / "out"))
    assert names[0] == f"{folder}/1.txt/0"
    assert names[1] == f"{folder}/3.jsonl.gz/0"
    assert report["rejected"] == 3
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reason.split(" ")[0] for reason in reasons] == ["text", "truncated", "cannot"]


# -- SLURM ----------------------------------------------------------------------------------------------------------

SBATCH = """
import os, re, subprocess, sys
from pathlib import Path
here, script = Path(os.environ["FAKE_SLURM"]), Path(sys.argv[-1]).read_text()
number = len(list(here.glob("job-*")))
(here / f"job-{number}").write_text(" ".join(sys.argv[1:-1]) + "\\n" + script)
if "merge_stats" not in script:
    for index in range(int(re.search(r"--array=0-(\\d+)", script)[1]) + 1):
        job = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_NODELIST": "localhost", "RUN_OFFSET": "0"}
        subprocess.run(["bash", sys.argv[-1]], env={**os.environ, **job}, check=True, stdout=2)
print("Submitted batch job", number)
"""
SCONTROL = "print('localhost')"
SRUN = 'import os, sys; at = sys.argv.index("launch_pickled_pipeline"); os.execvp(sys.argv[at], sys.argv[at:])'


def test_slurm_jobs_do_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datatrove's own job scripts and pickles; sbatch and srun are stand-ins that run the scripts here at once."""
    documents = {f"{number}": page(number % 4) for number in range(6)}
    settings = small(tmp_path, documents, [{"kind": "length"}])
    (tmp_path / "in" / "1.jsonl").write_text(json.dumps({"text": page(3)}) + "\n")
    run(settings)
    slurm = {
        "kind": "slurm",
        "partition": "cpu",
        "time": "01:00:00",
        "tasks_per_job": 2,
        "sbatch_args": {"account": "a"},
    }
    settings |= {"out": str(tmp_path / "jobs"), "executor": slurm}
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(ConfigError, match="no sbatch on this machine"):
        run(settings)
    for name, source in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable} -I\n{source}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert prepare(PrepConfig.model_validate(settings)).report is None
    script = (tmp_path / "jobs" / "work" / "00-read" / "launch_script.slurm").read_text()
    for line in ("--partition=cpu", "--time=01:00:00", "--array=0-0", "--account=a", "--job-name=prep-00-read"):
        assert f"#SBATCH {line}\n" in script
    jobs = [(tmp_path / f"job-{number}").read_text() for number in range(4)]
    assert ["--dependency=afterok" in job.split("\n")[0] for job in jobs[::2]] == [False, True]
    assert contents(tmp_path / "jobs") == contents(tmp_path / "out")


# -- errors ---------------------------------------------------------------------------------------------------------

CONFIG = """\
input:
  paths: [PATHS]
steps:
  - kind: gopher_quality
    min_doc_words: 20
  - kind: length
out: OUT
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gopher_quality", "gopher_qualty"), r"prep.yaml:4: steps.0: no kind 'gopher_qualty' \(did you mean 'goph"),
        (("min_doc_words", "min_doc_word"), r"prep.yaml:5: unknown key steps.0.min_doc_word \(did you mean 'min_"),
        (("20", "many"), r"prep.yaml:5: steps.0.min_doc_words: .*integer, got 'many'"),
        (("input:", "inputs:"), r"prep.yaml:1: input is required|unknown key inputs \(did you mean 'input'"),
        (("  - kind: length", "  - length"), r"prep.yaml:6: steps.1"),
        (("kind: length", "kind: length\n  - kind: length"), r"steps.2 \(length\) gives 'chars', which is steps.1's"),
        (("out: OUT", "out: OUT\nexecutor: {kind: slurm, partition: x}"), r"prep.yaml:8: executor.time is required"),
        (("out: OUT", "out: OUT\nexecutor: {kind: slumr}"), r"prep.yaml:8: executor: no kind 'slumr' \(did you mean"),
        (("out: OUT", "out: s3://bucket"), r"out must be a folder, not a URL"),
        (("out: OUT", "out: [OUT"), r"prep.yaml:8:1: not valid YAML"),
        (("out: OUT", "out: OUT\nwords: qq"), r"words: 'qq' is not `plain` and no language code"),
        (("out: OUT", "out: OUT\nwords: en"), r"words: 'en': Please install `spacy`"),
        (("PATHS", "nowhere/*.jsonl"), r"input.paths: no file at nowhere/\*.jsonl"),
        (("length", "language\n    model: no.bin"), r"steps.1.model: no.bin: No such file or directory; download"),
        (("length", "language\n    model: prep.yaml"), r"steps.1.model: prep.yaml is not a fastText model"),
        (("length", "tokens\n    tokenizer: none"), r"tokenizer none: no such file or folder"),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(
    change: tuple[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(json.dumps({"text": page(0)}) + "\n")
    assert change[0] in CONFIG
    text = CONFIG.replace(*change).replace("PATHS", "a.jsonl").replace("OUT", "out")
    Path("prep.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(load_prep_config("prep.yaml"))
    assert "\n" not in str(caught.value)


def test_without_the_extra_one_line_says_what_to_install(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "prep.yaml"
    path.write_text(yaml.safe_dump(settings))
    block = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'datatrove': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from pretrain.cli import main; main()\n"
    )
    command = [sys.executable, "-c", block, "data", "prep", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2, "headrace: error: preparing data needs datatrove: pip install 'headrace[prep]'\n"
    )  # fmt: skip
