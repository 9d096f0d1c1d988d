"""Transforms: what a document becomes depends on document, epoch and seed alone, and is what the papers say."""

import collections
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_corpus import jsonl, make_documents
from stopped_runs import hashes, save_tokenizer

from data_scheduler import DataConfig, Scheduler
from data_scheduler.config import SourceConfig
from data_scheduler.encoder import Encoder, load_encoder
from data_scheduler.formats.records import MarkedText, MarkedTokens
from data_scheduler.reading import UnitReader, whole_file
from data_scheduler.replay import trace
from data_scheduler.transforms.config import FimTransform
from data_scheduler.transforms.fim import Sentinels, contexts, rearrange
from data_scheduler.transforms.source_transforms import SourceTransforms
from headrace.errors import ConfigError
from headrace.validation import validated

Make = Callable[..., DataConfig]
SPECIALS = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|good|>"]
FIM = {"kind": "fim", "rate": 0.7, "spm_rate": 0.5}
PREFIX = {"kind": "prefix", "tokens": ["<|good|>"], "text": "from {name}: ", "rate": 0.6}
TEMPLATES = {
    "kind": "templates",
    "templates": [
        {"template": "{text}", "weight": 3},
        {"template": "{name}: {text}"},
        {"prompt": "Write {name}. ", "template": "{text}"},
    ],
}
DROPOUT = {"kind": "bpe_dropout", "p": 0.2}


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The corpus's tokenizer with special tokens for all of these."""
    return save_tokenizer(corpus, SPECIALS, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def encoder(tokenizer: str) -> Encoder:
    return load_encoder(tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of documents with a name each."""
    out = tmp_path_factory.mktemp("named")
    for shard in range(3):
        texts = make_documents(f"n{shard}", 60, shard)
        lines = [json.dumps({"text": text, "name": f"n{number}"}) for number, text in enumerate(texts)]
        (out / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return out


def source(folder: Path, *transforms: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"name": "s", "paths": [str(folder)], "transforms": list(transforms), **fields}


def applied(encoder: Encoder, documents: list[Any], epoch: int = 0, **fields: Any) -> list[Any]:
    config = SourceConfig.model_validate({"name": "s", "paths": ["x"], **fields})
    return SourceTransforms(config, encoder, seed=7).apply(documents, range(len(documents)), epoch)


# -- determinism -----------------------------------------------------------------------------------------------------


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.lists(st.sampled_from([FIM, DROPOUT, PREFIX, TEMPLATES]), min_size=1, unique_by=str),
    packing=st.sampled_from(["split", "best_fit"]),
    parts=st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 6]), st.integers(0, 3)), min_size=1, max_size=4
    ),
)
def test_stops_world_sizes_and_prefetch_change_nothing(
    data_config: Make,
    encoder: Encoder,
    tokenizer: str,
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    chosen: list[dict[str, Any]],
    packing: str,
    parts: list[tuple[int, int, int]],
) -> None:
    if FIM in chosen and TEMPLATES in chosen:
        chosen = [one for one in chosen if one is not FIM]  # these two are refused together
    run_dirs = [tmp_path_factory.mktemp("run") for _ in range(2)]

    def make(**changes: Any) -> DataConfig:
        return data_config(
            sources=[source(folder, *chosen)],
            tokenizer=tokenizer,
            packing=packing,
            global_batch_size=6,
            lanes=6,
            **changes,
        )

    assert hashes(make, encoder, parts, run_dirs[0]) == hashes(make, encoder, [], run_dirs[1])


def test_epochs_and_seeds_differ_and_repeat(encoder: Encoder) -> None:
    texts = make_documents("x", 200, 0)
    first, again, second = (
        applied(encoder, texts, epoch, transforms=[FIM, DROPOUT]) for epoch in (0, 0, 1)
    )  # fmt: skip
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert sum(np.array_equal(a, b) for a, b in zip(first, second, strict=True)) < 20


def test_what_lies_beside_a_document_changes_nothing(encoder: Encoder) -> None:
    config = SourceConfig.model_validate(source(Path("x"), FIM, DROPOUT))
    transforms = SourceTransforms(config, encoder, seed=7)
    texts = make_documents("x", 50, 0)
    together = transforms.apply(texts, range(50), 3)
    alone = [transforms.apply([text], [number], 3)[0] for number, text in enumerate(texts)]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


# -- fill in the middle ----------------------------------------------------------------------------------------------


def test_both_orders_as_in_the_paper() -> None:
    config = FimTransform(kind="fim", rate=1.0, spm_rate=0.5)
    sentinels = Sentinels(prefix=901, middle=902, suffix=903)
    third, two_thirds = np.uint64((1 << 64) // 3), np.uint64((1 << 64) // 3 * 2)
    low, high = np.uint64(0), np.uint64((1 << 64) - 1)
    # Six characters have seven boundaries: a third of the way is 2, two thirds 4.
    assert rearrange("abcdef", config, sentinels, np.array([low, high, two_thirds, third], np.uint64)) == [
        901, "ab", 903, "ef", 902, "cd",
    ]  # fmt: skip
    assert rearrange("abcdef", config, sentinels, np.array([low, low, third, two_thirds], np.uint64)) == [
        901, 903, "ef", 902, "ab", "cd",
    ]  # fmt: skip
    assert rearrange("ab", config, sentinels, np.array([low, high, low, high], np.uint64)) == [901, 903, 902, "ab"]
    never = FimTransform(kind="fim", rate=0.0)
    assert rearrange("abcdef", never, sentinels, np.zeros(4, np.uint64)) == ["abcdef"]


def test_every_document_can_be_put_together_again(encoder: Encoder) -> None:
    texts = [text + " <|fim_middle|> é漢" for text in make_documents("x", 400, 0)] + [""]
    made = applied(encoder, texts, transforms=[FIM])
    prefix, middle, suffix = (encoder.special_id(name) for name in SPECIALS[:3])
    orders: collections.Counter[str] = collections.Counter()
    for text, tokens in zip(texts, made, strict=True):
        ids = tokens.tolist()
        if prefix not in ids:
            assert np.array_equal(tokens, encoder.encode(text)), "documents that are not drawn stay as they are"
            orders["as it was"] += 1
            continue
        assert sorted(ids.count(number) for number in (prefix, middle, suffix)) == [1, 1, 1], "text forges none"
        order = sorted((ids.index(number), name) for number, name in ((prefix, "p"), (middle, "m"), (suffix, "s")))
        cut = {name: encoder.decode(ids[at + 1 : end]) for (at, name), end in zip(
            order, [*(place for place, _ in order[1:]), len(ids)], strict=True)}  # fmt: skip
        kind = "".join(name for _, name in order)
        # In SPM the prefix stands behind the middle's sentinel, before the middle.
        assert cut["p"] + cut["m"] + cut["s"] == text
        orders["spm" if ids[1] == suffix and cut["p"] == "" else kind] += 1
    assert orders["as it was"] == pytest.approx(120, abs=30)
    assert orders["spm"] == pytest.approx(140, abs=35)
    assert orders["psm"] == pytest.approx(140, abs=35)


def test_long_documents_are_cut_into_contexts(encoder: Encoder) -> None:
    assert contexts("abcdefg", 3) == ["abc", "def", "g"]
    text = "0123456789abcdef" * 20
    transform = {**FIM, "rate": 1.0, "context_characters": 32}
    (tokens,) = applied(encoder, [text], transforms=[transform])
    ids = tokens.tolist()
    assert ids.count(encoder.special_id("<|fim_middle|>")) == 10
    assert ids.count(encoder.eos_id) == 9, "each context but the last is closed"
    assert ids[-1] != encoder.eos_id


def test_a_tokenizer_without_sentinels_is_refused(data_config: Make, corpus: Path, tmp_path: Path) -> None:
    config = data_config(sources=[source(corpus / "a", FIM)])
    with pytest.raises(ConfigError, match=r"source 's': fim needs special tokens"):
        Scheduler(config, run_dir=tmp_path)
    assert not (tmp_path / "journal.jsonl").read_bytes(), "nothing is begun"
    names = {f"{part}_token": "<|endoftext|>" for part in ("prefix", "middle", "suffix")}
    Scheduler(data_config(sources=[source(corpus / "a", {**FIM, **names})]))
    config = data_config(sources=[source(corpus / "a", {**FIM, **names, "middle_token": "the"})])
    with pytest.raises(ConfigError, match="fim names 'the', which is no special token"):
        Scheduler(config)


# -- prefixes and templates ------------------------------------------------------------------------------------------


def test_prefixes_carry_no_loss_and_are_dropped_at_a_rate(data_config: Make, tokenizer: str, folder: Path) -> None:
    config = data_config(sources=[source(folder, PREFIX)], tokenizer=tokenizer)
    scheduler = Scheduler(config)
    good = scheduler.encoder.special_id("<|good|>")
    begun = with_prefix = 0
    for _ in range(10):
        batch = next(scheduler)
        for row in range(len(batch.tokens)):
            text_of = batch.tokens[row].tolist()
            edges = [*batch.starts[row].tolist(), len(text_of)]
            for begin, end, offset in zip(edges, edges[1:], batch.offsets[row].tolist(), strict=False):
                if offset:
                    continue
                begun += 1
                with_prefix += text_of[begin] == good
                if end - begin < 20:
                    continue
                weights = batch.weights[row]
                assert weights is not None, "all documents are marked or none"
                spelled = scheduler.encoder.decode(text_of[begin:end])
                prefix = re.match(r"<\|good\|>from n\d+: ", spelled)
                assert (text_of[begin] == good) == (prefix is not None)
                length = 0
                while prefix is not None and len(scheduler.encoder.decode(text_of[begin : begin + length])) < len(
                    prefix[0]
                ):
                    length += 1
                assert (weights[begin : begin + length] == 0).all()
                assert (weights[begin + length : end] == 1).all()
    assert begun > 100
    assert with_prefix / begun == pytest.approx(0.6, abs=0.12)


def test_a_learned_prefix_has_no_weights(encoder: Encoder) -> None:
    (tokens,) = applied(encoder, ["word"], transforms=[{"kind": "prefix", "tokens": ["<|good|>"], "learned": True}])
    assert encoder.decode(tokens) == "<|good|>word"
    (marked,) = applied(encoder, ["word"], transforms=[{"kind": "prefix", "text": "plain: "}])
    assert isinstance(marked, MarkedTokens)
    # All documents or none, for what is encoded together must not shape a sequence's hash.
    some = applied(encoder, ["word"] * 50, transforms=[{"kind": "prefix", "text": "plain: ", "rate": 0.5}])
    assert all(isinstance(document, MarkedTokens) for document in some)
    assert len({len(document.pieces) for document in some}) == 2
    assert [(encoder.decode(piece), learned) for piece, learned in marked.pieces] == [
        ("plain: ", False),
        ("word", True),
    ]


def test_templates_are_drawn_by_weight(encoder: Encoder, folder: Path) -> None:
    config = SourceConfig.model_validate(source(folder, TEMPLATES))
    documents = [
        document
        for path in sorted(folder.iterdir())
        for document in UnitReader(config).read(whole_file(str(path))[0]).documents
    ]
    made = [
        document
        for epoch in range(4)
        for document in SourceTransforms(config, encoder, 7).apply(documents, range(len(documents)), epoch)
    ]
    kinds: collections.Counter[str] = collections.Counter()
    for document in made:
        assert isinstance(document, MarkedTokens)
        spelled = [(encoder.decode(piece), learned) for piece, learned in document.pieces]
        if len(spelled) == 2:
            assert re.fullmatch(r"Write n\d+\. ", spelled[0][0])
            kinds["prompt"] += 1
        else:
            kinds["named" if re.match(r"n\d+: ", spelled[0][0]) else "plain"] += 1
        assert [learned for _, learned in spelled] == [False, True][-len(spelled) :]
    assert kinds["plain"] / len(made) == pytest.approx(0.6, abs=0.06)
    assert kinds["named"] / len(made) == pytest.approx(0.2, abs=0.05)


def test_a_record_must_have_the_fields_of_all_templates(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b", "name": 3}\n')
    config = SourceConfig.model_validate(source(tmp_path, TEMPLATES))
    records = UnitReader(config).read(whole_file(str(tmp_path / "x.jsonl"))[0])
    assert [reject.reason for reject in records.rejects] == ["field 'name' is missing"]
    assert records.documents[1] is not None


def test_masked_text_keeps_its_marks(encoder: Encoder) -> None:
    document = MarkedText((("quiet ", False), ("said", True)), 0.5)
    prefix = {"kind": "prefix", "tokens": ["<|good|>"]}
    (made,) = applied(encoder, [document], masked_key="m", transforms=[prefix, DROPOUT])
    assert made.weight == 0.5
    assert [(encoder.decode(piece), learned) for piece, learned in made.pieces] == [
        ("<|good|>", False), ("quiet ", False), ("said", True),
    ]  # fmt: skip


# -- together with the rest ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"transforms": [FIM, FIM]}, "fim is there twice"),
        ({"transforms": [TEMPLATES], "template": "{text}"}, "templates takes the place of template"),
        ({"transforms": [FIM], "prompt": "{q}"}, "fim moves text around"),
        ({"transforms": [FIM, TEMPLATES]}, "fim moves text around"),
        ({"transforms": [FIM], "format": "npy"}, "fim work on text, but format npy holds token ids"),
        ({"transforms": [{"kind": "fin"}]}, r"no kind 'fin' \(did you mean 'fim'"),
        ({"transforms": [{"kind": "fim", "spm": 1}]}, r"unknown key transforms.0.spm \(did you mean 'spm_rate'"),
        ({"transforms": [{"kind": "prefix"}]}, "give tokens or text"),
        ({"transforms": [{"kind": "fim", "prefix_token": "<p>"}]}, "belong together"),
        ({"transforms": [{"kind": "bpe_dropout", "p": 1.5}]}, "less than or equal to 1"),
        ({"transforms": [{"kind": "templates", "templates": [{"template": "none"}]}]}, "names no field"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        validated(SourceConfig, {"name": "s", "paths": ["x"], **fields}, "run.yaml")
    assert "\n" not in str(caught.value)


def test_token_files_take_control_tokens_only(data_config: Make, tokenizer: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([5, 6, 7, 0] * 4000, np.uint16))
    with pytest.raises(ConfigError, match=r"source 's': transforms: bpe_dropout work on text, but .*x.npy holds"):
        Scheduler(data_config(sources=[source(tmp_path, DROPOUT)], tokenizer=tokenizer))
    prefix = {"kind": "prefix", "tokens": ["<|good|>"]}
    scheduler = Scheduler(data_config(sources=[source(tmp_path, prefix)], tokenizer=tokenizer))
    batch = next(scheduler)
    assert batch.tokens[0, :5].tolist() == [scheduler.encoder.special_id("<|good|>"), 5, 6, 7, 0]


def test_the_token_cache_holds_what_was_not_transformed(
    data_config: Make, encoder: Encoder, tokenizer: str, folder: Path, tmp_path: Path
) -> None:
    prefix = {"kind": "prefix", "tokens": ["<|good|>"], "rate": 0.5}

    def digests(cache: Path | None, *transforms: dict[str, Any]) -> list[list[bytes]]:
        config = data_config(
            sources=[source(folder, *transforms)], tokenizer=tokenizer, token_cache=cache and str(cache)
        )
        scheduler = Scheduler(config, encoder=encoder)
        return [next(scheduler).digests for _ in range(3)]

    digests(tmp_path / "a")
    entries = sorted((tmp_path / "a").rglob("*.tok"))
    for transforms in ([FIM], [DROPOUT], [TEMPLATES], [PREFIX], [prefix], [prefix, DROPOUT]):
        expected = digests(None, *transforms)
        for _ in range(2):
            assert digests(tmp_path / "a", *transforms) == expected, transforms
    assert sorted((tmp_path / "a").rglob("*.tok")) == entries, "a prefix of tokens uses the same entries, others none"
    assert digests(tmp_path / "a") == digests(None)


def test_a_run_keeps_its_transforms(data_config: Make, tokenizer: str, folder: Path, tmp_path: Path) -> None:
    next(Scheduler(data_config(sources=[source(folder, FIM)], tokenizer=tokenizer), run_dir=tmp_path))
    next(Scheduler(data_config(sources=[source(folder, FIM)], tokenizer=tokenizer), run_dir=tmp_path))
    with pytest.raises(ConfigError, match=r"data.sources.s.transforms was .* when the source entered the run"):
        Scheduler(data_config(sources=[source(folder, {**FIM, "rate": 0.2})], tokenizer=tokenizer), run_dir=tmp_path)


def test_trace_shows_document_and_what_was_given(
    data_config: Make, tokenizer: str, folder: Path, tmp_path: Path
) -> None:
    plain = {"name": "plain", "paths": [str(folder)]}
    config = data_config(sources=[source(folder, {**FIM, "rate": 1.0}, DROPOUT), plain], tokenizer=tokenizer)
    scheduler = Scheduler(config, run_dir=tmp_path)
    for _ in range(3):
        next(scheduler)
    texts = {json.loads(line)["text"] for path in folder.iterdir() for line in path.read_text().splitlines()}
    traced = trace(tmp_path, 2)
    assert {document.text for document in traced} <= texts
    for document in traced:
        assert (document.given is None) == (document.source == "plain")
        if document.given is not None and document.token_start == 0:
            assert document.given.startswith("<|fim_prefix|>")


def test_files_that_join_are_looked_at_too(data_config: Make, tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(make_documents("x", 300, 0)))
    config = data_config(sources=[source(tmp_path, DROPOUT, watch=True)], tokenizer=tokenizer, watch_every=1)
    scheduler = Scheduler(config)
    next(scheduler)
    np.save(tmp_path / "y.npy", np.array([5, 6, 7, 0] * 4000, np.uint16))
    with pytest.raises(ConfigError, match=r"y.npy holds token ids"):
        for _ in range(20):
            next(scheduler)
