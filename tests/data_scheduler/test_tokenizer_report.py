"""The report's three numbers against counts made by hand, and the command line around training and reporting."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from data_scheduler.tokenizer_report import Fit, Spans, load_segmenter, measure, take_bytes, word_pattern
from data_scheduler.tokenizer_training import train_tokenizer
from headrace.errors import ConfigError
from pretrain.cli.tokenizer import app


class Cut:
    """Cuts a text at the bars of a given sentence, which stand where tokens meet."""

    vocab_size = 100

    def __init__(self, *sentences: str) -> None:
        self.cuts = {sentence.replace("|", ""): sentence for sentence in sentences}

    def spans(self, text: str) -> Spans:
        ends = np.cumsum([len(token) for token in self.cuts[text].split("|")])
        return np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1).astype(np.int64)


def test_numbers_counted_by_hand() -> None:
    # Words: The (1 token), quick (2), fox (1), don (1), t (1), 42 (2). Ten tokens, with the comma and the apostrophe.
    fit = measure(Cut("The| qu|ick| fox|,| don|'|t| 4|2"), ["The quick fox, don't 42"])
    assert fit == Fit(documents=1, bytes=23, tokens=10, words=6, word_tokens=8, continued_words=2)
    assert fit.compression_rate == 2.3
    assert fit.fertility == 8 / 6
    assert fit.continued == 2 / 6


def test_bytes_not_characters_and_documents_add_up() -> None:
    # é is 2 bytes, 漢 and 字 3 each. Words: dé (2 tokens), 漢字 (1); then: a (1).
    fit = measure(Cut("d|é| 漢字", "a"), ["dé 漢字", "a"])
    assert fit == Fit(documents=2, bytes=10 + 1, tokens=4, words=3, word_tokens=4, continued_words=1)
    assert fit.compression_rate == 11 / 4


def test_a_token_across_two_words_belongs_to_both() -> None:
    fit = measure(Cut("of the| sea"), ["of the sea"])
    assert (fit.words, fit.word_tokens, fit.continued_words) == (3, 3, 0)


def test_no_words_no_tokens() -> None:
    fit = measure(Cut("...| !"), ["... !"])
    assert (fit.words, fit.tokens) == (0, 2)
    assert math.isnan(fit.fertility)
    assert math.isnan(fit.continued)
    assert math.isnan(measure(Cut(), []).compression_rate)


def test_words() -> None:
    assert word_pattern().findall("don't stop_2 at e\u0301te\u0301, नमस्ते दुनिया! (x+y)") == [
        "don", "t", "stop_2", "at", "e\u0301te\u0301", "नमस्ते", "दुनिया", "x", "y",
    ]  # fmt: skip


def test_take_bytes_cuts_between_characters() -> None:
    assert take_bytes(["abc", "déf", "never"], 5) == ["abc", "d"]
    assert take_bytes(["abc", "déf", "never"], 6) == ["abc", "dé"]
    assert take_bytes(["abc"], 100) == ["abc"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text = Path(__file__).read_text("utf-8")
    for source in ("alpha", "beta"):
        (folder / source).mkdir()
        for shard in range(2):
            lines = [json.dumps({"text": text[k : k + 500], "body": "other"}) for k in range(0, len(text), 500)]
            file = folder / source / f"train-{shard:05d}.jsonl.gz"
            file.write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "page.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([Path(__file__).read_text("utf-8")], 600, out)
    return out


def test_a_real_tokenizer_agrees_with_single_words(tokenizer: Path) -> None:
    segmenter = load_segmenter(tokenizer)
    # Every digit and every 24 spaces are one token; two words of five digits each.
    fit = measure(segmenter, [" " * 48 + "12345" + " " * 24 + "67890"])
    assert (fit.tokens, fit.words, fit.word_tokens, fit.continued_words) == (13, 2, 10, 2)
    # A character of several byte tokens counts each of them.
    fit = measure(segmenter, ["\U0001d7d8"])
    assert (fit.bytes, fit.tokens, fit.words, fit.word_tokens) == (4, 4, 1, 4)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_train_command(data: Path, tmp_path: Path) -> None:
    # As the shell expands `--data DIR/*/train-*`: the first path is the option's, the others follow it.
    files = sorted(data.glob("*/train-*"))
    result = invoke("train", "--data", *files, "--vocab-size", 500, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "500 tokens from" in result.output
    assert invoke("train", "--data", f"{data}/*/train-*", "--vocab-size", 500, "--out", tmp_path / "b").exit_code == 0
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    result = invoke("train", "--data", data, "--vocab-size", 90000, "--out", tmp_path / "c")
    assert "of 90,000 asked" in result.output


def test_max_bytes_takes_from_every_path_alike(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_scheduler import reading

    read: list[str] = []
    original = reading.read_documents

    def counting(path: str, *arguments: str) -> object:
        for text in original(path, *arguments):
            read.append(Path(path).parent.name)
            yield text

    monkeypatch.setattr(reading, "read_documents", counting)
    paths = (data / "alpha", "--data", data / "beta")
    assert invoke("train", "--data", *paths, "--max-bytes", 6000, "--vocab-size", 300, "--out", tmp_path).exit_code == 0
    assert {name: read.count(name) for name in read} == {"alpha": 6, "beta": 6}


def test_report_command(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    train_tokenizer(["nothing alike"], 300, tmp_path)
    shards = sorted(data.glob("*/train-*"))
    named = f"mine={data / 'page.txt'}"
    result = invoke("report", tokenizer, "--data", *shards, named, data / "page.txt", "--compare", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert list(report["sources"]) == ["alpha", "beta", "mine", "page"]
    assert report["vocab_size"] == {str(tokenizer): 600, str(tmp_path): 287}
    assert report["sources"]["mine"] == report["sources"]["page"]
    for row in report["sources"].values():
        ours, other = row[str(tokenizer)], row[str(tmp_path)]
        assert ours["compression_rate"] == ours["bytes"] / ours["tokens"] > other["compression_rate"]
        assert 1 <= ours["fertility"] < other["fertility"]
        assert 0 <= ours["continued_words"] < other["continued_words"] <= 1
    table = invoke("report", tokenizer, "--data", data / "alpha", "--compare", tmp_path).output
    assert "alpha" in table
    assert "fertility" in table
    assert f"{report['sources']['alpha'][str(tokenizer)]['compression_rate']:.3f}" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "{data}/absent", "--vocab-size", 500, "--out", "{out}"], "no file at"),
        (["train", "--vocab-size", 500, "--out", "{out}"], "no --data given"),
        (["train", "--data", "{data}", "--vocab-size", 50, "--out", "{out}"], "at least 287"),
        (["train", "--data", "{data}/alpha", "--text-key", "title", "--vocab-size", 500, "--out", "{out}"], "no text"),
        (["report", "{data}/absent", "--data", "{data}"], "no such file or folder"),
        (["report", "{tokenizer}"], "no --data given"),
        (["report", "{tokenizer}", "--data", "{data}/absent"], "no file at"),
        (["report", "{tokenizer}", "--data", "{data}/beta", "--text-key", "title"], "beta: no text in field 'title'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[object], message: str, data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    filled = [str(a).format(data=data, tokenizer=tokenizer, out=tmp_path / "out") for a in arguments]
    result = invoke(*filled)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "out").exists()
