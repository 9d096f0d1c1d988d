"""`headrace eval`: lm-eval's tasks on a run, offline; figures as of lm-eval's own model on the exported folder."""

import gc
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from converted_runs import MODELS, Trained, train
from refused_command import refusal
from typer.testing import CliRunner

from headrace.errors import ConfigError
from pretrain import cli
from pretrain.convert.loaded import Loaded, load
from pretrain.metrics import read_records

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `eval`)")

CHOICES = {"acc", "acc_norm"}
DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "lambada_openai": ("test", {"text": "the cat and the dog saw the cat"}),
    "lambada_standard": ("test", {"text": "the cat and the dog saw the cat"}),
    "winogrande": ("validation", {"sentence": "A cat saw _ run.", "option1": "a", "option2": "b", "answer": "1"}),
    "hellaswag": (
        "validation",
        {"activity_label": "A", "ctx_a": "he", "ctx_b": "sat", "endings": ["a", "b", "c", "d"], "label": "2"},
    ),
    "piqa": ("validation", {"goal": "cut", "sol1": "a knife", "sol2": "a cloud", "label": 0}),
    "race": (
        "test",
        {
            "article": "It rained.",
            "problems": str([{"question": "What fell?", "options": ["rain", "x", "y", "z"], "answer": "A"}]),
        },
    ),
    "boolq": ("validation", {"passage": "It rained.", "question": "did it rain", "label": 1}),
    "belebele_eng_Latn": (
        "test",
        {"flores_passage": "Rain.", "question": "What?", "correct_answer_num": "1"}
        | {f"mc_answer{number}": str(number) for number in range(1, 5)},
    ),
    "xnli_en": ("validation", {"premise": "It rained", "hypothesis": "it was wet.", "label": 0}),
    "xstorycloze_en": (
        "eval",
        {f"input_sentence_{number}": "It rained." for number in range(1, 5)}
        | {"sentence_quiz1": "Wet.", "sentence_quiz2": "Dry.", "answer_right_ending": 1},
    ),
    "xwinograd_en": ("test", {"sentence": "A cat saw _ run.", "option1": "a", "option2": "b", "answer": "1"}),
}
"""Of each family one task: the split that is scored, and a record with the columns of its data set."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("scored"), MODELS["tied GQA"])


@pytest.fixture(scope="module")
def loaded(trained: Trained) -> Loaded:
    return load(trained.run_dir)


@pytest.fixture(scope="module")
def roomy(trained: Trained) -> Loaded:
    """The model with room for whole questions, a token a character; its rotary embedding knows no end."""
    loaded = load(trained.run_dir)
    loaded.model.config.max_position_embeddings = 1024
    return loaded


@pytest.fixture(scope="module", autouse=True)
def no_groups_left_over() -> Iterator[None]:
    """Closed groups live on in cycles; collected in a later test's forked child they would hang it (see run_ranks)."""
    yield
    gc.collect()


@pytest.fixture
def task_data(tmp_path: Path) -> Path:
    for task, (split, record) in DATA.items():
        (tmp_path / "data" / task).mkdir(parents=True)
        (tmp_path / "data" / task / f"{split}.jsonl").write_text(3 * (json.dumps(record) + "\n"))
    return tmp_path / "data"


def test_answers_equal_those_of_lm_evals_own_model(trained: Trained, loaded: Loaded) -> None:
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from pretrain.evaluation.language_model import LanguageModel

    kind: Any = transformers.AutoModelForCausalLM
    theirs = HFLM(
        pretrained=kind.from_pretrained(trained.hf),
        tokenizer=transformers.AutoTokenizer.from_pretrained(trained.hf),
        batch_size=3,
    )
    ours = LanguageModel(loaded, batch_size=2)

    def requests(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
        return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]

    pairs = [("", "a text"), ("def f", "(x)"), ("two ", "spaces"), ("A or", " A"), ("A or", " B"), ("x" * 70, " end")]
    asked = requests("loglikelihood", pairs)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert ours.cut == 1
    texts = requests("loglikelihood_rolling", [("short",), ("a text of more than one window, " * 3,)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-3)
    written = theirs.generate_until(requests("generate_until", [("def f", {"until": ["\n"], "max_gen_toks": 16})]))
    assert len(written[0]) > 2
    stop = written[0][2]
    for until in (["\n"], [stop], stop):
        asked = requests("generate_until", [("def f", {"until": until, "max_gen_toks": 16}), ("x" * 70, {"until": []})])
        assert ours.generate_until(asked[:1]) == theirs.generate_until(asked[:1])
    assert ours.generate_until(asked[1:])[0]


def test_a_continuation_leaves_room_for_its_context(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a longest sequence of 32 tokens; a token is a character."""
    from lm_eval.api.instance import Instance

    from pretrain.evaluation.language_model import LanguageModel

    model = LanguageModel(loaded, batch_size=1)
    read: list[tuple[int, int]] = []
    write = loaded.model.generate

    def generate(ids: Any, *, generation_config: Any, **rest: Any) -> Any:
        read.append((ids.shape[1], generation_config.max_new_tokens))
        return write(ids, generation_config=generation_config, **rest)

    monkeypatch.setattr(loaded.model, "generate", generate)

    def ask(**options: Any) -> None:
        requests = [("x" * 100, options), ("short", options)]
        model.generate_until([Instance("generate_until", {}, one, number) for number, one in enumerate(requests)])

    ask(until=["\n"])
    assert (read, model.cut) == ([(16, 16), (5, 16)], 1)
    read.clear()
    ask(until=["\n"], max_tokens=24)
    assert (read, model.cut) == ([(8, 24), (5, 24)], 2)
    read.clear()
    with pytest.raises(ConfigError, match=r"up to 32 tokens leave no room .* longest sequence, 32"):
        ask(until=["\n"], max_gen_toks=32)
    assert not read


def test_what_cannot_be_written_is_told_before_the_model_is_read(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run, ignore=shutil.ignore_patterns("evaluations", "metrics.jsonl", "*.distcp"))
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))

    def said(*more: str) -> str:
        return refusal(["eval", str(run), "--tasks", "headrace_tiny", *more], monkeypatch, capfd)

    assert f"--out {run}: cannot be written: Is a directory" in said("--out", str(run))
    assert "cannot be written: Not a directory" in said("--out", str(tmp_path / "file" / "report.json"))
    assert ".distcp is missing" in said("--out", str(tmp_path / "new" / "report.json"))  # the model is read
    (run / "metrics.jsonl").mkdir()
    assert "metrics.jsonl: cannot be written" in said()
    (run / "metrics.jsonl").rmdir()
    (run / "evaluations").write_text("")
    assert "evaluations: cannot be written" in said()
    (run / "evaluations").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_scores_that_are_no_numbers_are_kept_as_valid_json(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And kept in the run although --out fails in the end, as a disk does that has become full meanwhile."""
    from pretrain.evaluation import results, score
    from pretrain.evaluation.score import Outcome, Score, TaskScores

    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run, ignore=shutil.ignore_patterns("evaluations", "metrics.jsonl"))
    scores = {"word_perplexity": Score(math.inf, None, False), "acc": Score(math.nan, math.nan, True)}
    outcome = Outcome({"text": TaskScores(scores, items=1, of_items=1, shots=0)}, {}, 0)
    monkeypatch.setattr(score, "score", lambda *_: outcome)
    write = results.write_report

    def full(content: dict[str, Any], path: Path) -> None:
        if path == tmp_path / "out.json":
            raise OSError(28, "No space left on device")
        write(content, path)

    monkeypatch.setattr(results, "write_report", full)
    arguments = ["eval", str(run), "--tasks", "headrace_tiny", "--json", "--out", str(tmp_path / "out.json")]
    shown = CliRunner().invoke(cli.app, arguments)
    assert isinstance(shown.exception, OSError)
    (kept,) = (run / "evaluations").iterdir()
    for text in (shown.stdout, kept.read_text()):
        found = json.loads(text, parse_constant=pytest.fail)["tasks"]["text"]["scores"]
        assert found["word_perplexity"]["value"] == "Infinity"
        assert found["acc"]["standard_error"] == "NaN"
    (record,) = read_records(run / "metrics.jsonl")
    assert record["eval"]["text/word_perplexity"] == math.inf


def test_the_built_in_tasks_are_scored_and_kept(trained: Trained, tmp_path: Path) -> None:
    shown = CliRunner().invoke(cli.app, ["eval", str(trained.run_dir), "--tasks", "headrace_tiny", "--limit", "6"])
    assert shown.exit_code == 0, shown.output
    assert "headrace_choice" in shown.stdout
    assert "bootstrapping" not in shown.stdout
    (kept,) = (trained.run_dir / "evaluations").iterdir()
    assert kept.name == "step-2-1.json"
    report = json.loads(kept.read_text())
    assert set(report["tasks"]) == {"headrace_choice", "headrace_cloze", "headrace_copy", "headrace_text"}
    choice = report["tasks"]["headrace_choice"]
    assert (choice["items"], choice["of_items"], choice["shots"], choice["version"]) == (6, 24, 0, "1.0")
    assert choice["scores"]["acc"]["standard_error"] > 0
    assert (report["step"], report["arguments"]["limit"]) == (2, 6)
    (record,) = read_records(trained.run_dir / "metrics.jsonl")
    assert record["step"] == 2
    assert record["eval"]["headrace_choice/acc"] == choice["scores"]["acc"]["value"]
    # The exported folder says the same, has no place for it, and prints JSON and nothing else.
    before = sorted(path.name for path in trained.hf.iterdir())
    out = tmp_path / "sent" / "report.json"
    arguments = ["eval", str(trained.hf), "--tasks", "headrace_tiny", "--limit", "6", "--json", "--out", str(out)]
    again = CliRunner().invoke(cli.app, arguments)
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == json.loads(out.read_text())
    assert sorted(path.name for path in trained.hf.iterdir()) == before
    for name, found in json.loads(again.stdout)["tasks"].items():
        for metric, value in found["scores"].items():
            assert value["value"] == pytest.approx(report["tasks"][name]["scores"][metric]["value"], rel=1e-4)


def test_every_named_family_runs_from_local_files(roomy: Loaded, task_data: Path) -> None:
    from pretrain.evaluation.score import score

    names = [name for name in DATA if not name.startswith("lambada")]
    outcome = score(roomy, ["lambada", *names], task_data, limit=2)
    assert set(outcome.tasks) == set(DATA)
    for name, found in outcome.tasks.items():
        assert (found.items, found.of_items) == (2, 3)
        assert set(found.scores) <= CHOICES | {"perplexity"}
        assert 0 <= found.scores["acc"].value <= 1, name
    both = [outcome.tasks[name].scores["acc"].value for name in ("lambada_openai", "lambada_standard")]
    assert outcome.groups["lambada"].scores["acc"].value == pytest.approx(sum(both) / 2)


def test_solved_examples_are_put_before_a_question(roomy: Loaded) -> None:
    from pretrain.evaluation.score import score

    none, two = (score(roomy, ["headrace_choice"], None, shots=shots).tasks["headrace_choice"] for shots in (0, 2))
    assert (none.shots, two.shots) == (0, 2)
    assert none.scores != two.scores


def test_a_task_of_ones_own(loaded: Loaded, tmp_path: Path) -> None:
    from pretrain.evaluation.score import score

    own = tmp_path / "mine"
    own.mkdir()
    (own / "mine.yaml").write_text(
        "task: mine\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['a', 'b']\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    (own / "test.jsonl").write_text('{"q": "first:", "answer": 0}\n{"q": "second:", "answer": 0}\n')
    found = score(loaded, ["mine"], tmp_path).tasks["mine"]
    assert found.items == 2


def test_mistakes_are_told_in_one_line(
    trained: Trained, task_data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(tasks: str, *more: str) -> str:
        return refusal(["eval", str(trained.run_dir), "--tasks", tasks, *more], monkeypatch, capfd)

    assert "no task 'winogrend'; did you mean winogrande" in said("winogrend")
    assert "--task-data DIR with DIR/piqa/validation.jsonl" in said("piqa")
    (task_data / "piqa" / "validation.jsonl").unlink()
    assert f"no {task_data / 'piqa' / 'validation.jsonl'}" in said("piqa", "--task-data", str(task_data))
    assert "14 of the 15 tasks of xnli lack theirs" in said("xnli", "--task-data", str(task_data))
    assert "solved examples of winogrande" in said("winogrande", "--task-data", str(task_data), "--shots", "1")
    assert "no such folder" in said("piqa", "--task-data", str(task_data / "nowhere"))
    (task_data / "boolq" / "validation.jsonl").write_text('{"text": "of another data set"}\n')
    assert "do not fit the task" in said("boolq", "--task-data", str(task_data))
    (task_data / "race" / "test.jsonl").write_text("")
    assert "do not fit the task" in said("race", "--task-data", str(task_data))
    long = {"text": f"short {'x' * 50}"}
    (task_data / "lambada_openai" / "test.jsonl").write_text(json.dumps(long))
    assert "longer than the model's longest sequence, 32" in said("lambada_openai", "--task-data", str(task_data))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'headrace[eval]'" in said("headrace_tiny")
