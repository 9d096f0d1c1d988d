"""`headrace data prep`: what is removed, what is added, and that nothing else happens."""

import gzip
import itertools
import json
import re
import zlib
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

pytest.importorskip("datatrove")

from planted import (
    GOOD,
    NEAR,
    PLANTED,
    REPEATED,
    SHORT,
    SYMBOLS,
    output,
    page,
    removed,
    run,
    small,
)

from data_scheduler import DataConfig, Scheduler

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


# -- other steps ----------------------------------------------------------------------------------------------------


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
    # One thread of fastText leaves nine tenths of its first weights unset (whatever memory held, at times NaN), so
    # every word is given its first vector.
    words = sorted({"</s>", *" ".join(german + english).split()})
    vectors = [
        f"{word} {' '.join(str((row * 8 + column) % 7 / 100) for column in range(8))}" for row, word in enumerate(words)
    ]
    (tmp_path / "first.vec").write_text("\n".join([f"{len(words)} 8", *vectors]) + "\n")
    model = fasttext.train_supervised(
        str(tmp_path / "train.txt"),
        pretrainedVectors=str(tmp_path / "first.vec"),
        dim=8,
        epoch=30,
        lr=1.0,
        thread=1,
        verbose=0,
    )
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
