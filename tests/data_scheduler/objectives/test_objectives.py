"""Objectives in the stream: drawn from a document's name alone, carried through packing, state, replay and hashes."""

import collections
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpus import jsonl, make_documents
from stopped_runs import hashes, save_tokenizer

from data_scheduler import DataConfig, Scheduler, batch_sha256
from data_scheduler.batch import Batch
from data_scheduler.config import SourceConfig
from data_scheduler.encoder import Encoder, load_encoder
from data_scheduler.objectives.draw import Fim, Objectives
from data_scheduler.objectives.prefix_lm import PrefixLm
from data_scheduler.objectives.span_corruption import SpanCorruption
from data_scheduler.replay import replay
from headrace.errors import ConfigError
from headrace.validation import validated

Make = Callable[..., DataConfig]
CAUSAL = {"kind": "causal", "weight": 1.0}
PREFIX = {"kind": "prefix_lm", "context_tokens": 64}
SPANS = {"kind": "span_corruption", "context_tokens": 64}
FIM = {"kind": "fim"}
UL2 = {"kind": "ul2", "context_tokens": 64, "weight": 2.0}
ALL = [CAUSAL, PREFIX, SPANS, FIM, UL2]
SPECIALS = [
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "[R]", "[S]", "[X]", "<|good|>",
    *(f"<extra_id_{number}>" for number in range(12)),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The corpus's tokenizer with sentinels and mode tokens."""
    return save_tokenizer(corpus, SPECIALS, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def encoder(tokenizer: str) -> Encoder:
    return load_encoder(tokenizer)


@pytest.mark.parametrize(
    ("packing", "parts"),
    [("split", [(2, 2, 1), (1, 3, 0), (3, 1, 2)]), ("best_fit", [(3, 1, 0), (1, 2, 2), (2, 6, 1)])],
)
def test_stops_world_sizes_and_prefetch_change_nothing(
    data_config: Make,
    encoder: Encoder,
    tokenizer: str,
    tmp_path_factory: pytest.TempPathFactory,
    packing: str,
    parts: list[tuple[int, int, int]],
) -> None:
    def make(**changes: Any) -> DataConfig:
        return data_config(
            tokenizer=tokenizer,
            packing=packing,
            global_batch_size=6,
            lanes=6,
            objectives=[CAUSAL, PREFIX, SPANS, FIM, UL2],
            **changes,
        )

    run_dirs = [tmp_path_factory.mktemp("run") for _ in range(2)]
    expected = hashes(make, encoder, [], run_dirs[1])
    assert hashes(make, encoder, parts, run_dirs[0]) == expected
    again = [batch_sha256(batch.digests) for batch in replay(run_dirs[0], 0, 7)]
    assert again == expected


def given_documents(batches: list[Batch]) -> list[tuple[tuple[int, int], list[int], list[float], int]]:
    """(source and id, tokens, weights, prefix) of every whole document that begins and ends in a sequence."""
    found = []
    for batch in batches:
        for row in range(len(batch.tokens)):
            edges = [*batch.starts[row].tolist(), batch.tokens.shape[1]]
            weights, prefixes = batch.weights[row], batch.prefix_lengths[row]
            for number, (begin, end) in enumerate(itertools.pairwise(edges)):
                tokens = batch.tokens[row, begin:end].tolist()
                if batch.offsets[row][number] or tokens[-1] != 0:
                    continue
                name = int(batch.source_ids[row]), int(batch.segment_ids[row][number])
                own = [1.0] * len(tokens) if weights is None else weights[begin:end].tolist()
                found.append((name, tokens, own, 0 if prefixes is None else int(prefixes[number])))
    return found


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_the_batch_says_what_each_document_teaches(
    data_config: Make, encoder: Encoder, tokenizer: str, packing: str
) -> None:
    objectives = [CAUSAL, {**PREFIX, "mode_token": "[S]"}, {**SPANS, "mode_token": "[R]", "bidirectional": True}]
    config = data_config(tokenizer=tokenizer, packing=packing, objectives=objectives, seq_len=256)
    scheduler = Scheduler(config, encoder=encoder)
    documents = given_documents([next(scheduler) for _ in range(2)])
    s, r, first = (encoder.special_id(name) for name in ("[S]", "[R]", "<extra_id_0>"))
    kinds: collections.Counter[str] = collections.Counter()
    for _, tokens, weights, prefix in documents:
        if tokens[0] == s:
            kinds["prefix"] += 1
            assert 2 <= prefix < len(tokens)
            assert weights == [0.0] * prefix + [1.0] * (len(tokens) - prefix)
        elif tokens[0] == r:
            kinds["spans"] += 1
            target = [at for at, token in enumerate(tokens) if token == first][1]
            if tokens.count(0) == 1:  # one piece: its target is the rest
                assert prefix == target
                assert weights == [0.0] * target + [1.0] * (len(tokens) - target)
        else:
            kinds["causal"] += 1
            assert prefix == 0
            assert set(weights) == {1.0}
    assert min(kinds.values()) > 20, kinds


def test_objectives_are_drawn_by_weight(encoder: Encoder) -> None:
    asked = [CAUSAL, {**FIM, "weight": 0.5}, UL2, {**PREFIX, "weight": 0.5}]
    config = SourceConfig.model_validate({"name": "s", "paths": ["x"], "objectives": asked})
    objectives = Objectives(config.objectives or [], encoder, "s")
    drawn = collections.Counter(type(objectives.draw(0, "objective", "s", 0, number)) for number in range(4000))
    shares = {type(None): 1.0, Fim: 0.5, SpanCorruption: 2.0 * 6 / 7, PrefixLm: 0.5 + 2.0 / 7}
    assert drawn.keys() == shares.keys()
    for kind, share in shares.items():
        assert drawn[kind] / 4000 == pytest.approx(share / 4.0, abs=0.025), kind


def test_a_prefix_that_its_sequence_cuts_is_causal_and_so_is_what_follows(
    data_config: Make, encoder: Encoder, tokenizer: str
) -> None:
    config = data_config(tokenizer=tokenizer, objectives=[{**PREFIX, "min_share": 0.9}], seq_len=40)
    scheduler = Scheduler(config, encoder=encoder)
    cut = 0
    for batch in (next(scheduler) for _ in range(8)):
        for row in range(len(batch.tokens)):
            prefixes = batch.prefix_lengths[row]
            assert prefixes is not None
            lengths = np.diff([*batch.starts[row].tolist(), batch.tokens.shape[1]])
            assert (prefixes < lengths).all()
            assert not prefixes[batch.offsets[row] > 0].any()
            cut += int(((prefixes == 0) & (batch.offsets[row] == 0) & (lengths > 2)).sum())
    assert cut > 50


def test_epochs_draw_anew_and_the_same_each_time(data_config: Make, encoder: Encoder, tokenizer: str) -> None:
    small = [{"name": "a", "paths": data_config().sources[2].paths}]

    def documents(seed: int) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
        config = data_config(
            tokenizer=tokenizer, sources=small, objectives=[CAUSAL, SPANS], lanes=2, global_batch_size=2, seed=seed
        )
        scheduler = Scheduler(config, encoder=encoder)
        return [(name, tuple(tokens)) for name, tokens, *_ in given_documents([next(scheduler) for _ in range(90)])]

    versions: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for name, tokens in documents(0):
        versions.setdefault(name, set()).add(tokens)
    assert sum(len(each) > 1 for each in versions.values()) > 20
    assert documents(0) == documents(0)
    assert documents(0) != documents(1)


def test_a_source_can_have_its_own(data_config: Make, encoder: Encoder, tokenizer: str) -> None:
    sources = [source.model_dump() for source in data_config().sources]
    sources[1]["objectives"] = []
    sources[2]["objectives"] = [PREFIX]
    plain = Scheduler(data_config(tokenizer=tokenizer), encoder=encoder)
    mixed = Scheduler(data_config(tokenizer=tokenizer, sources=sources, objectives=[SPANS]), encoder=encoder)
    for _ in range(3):
        expected, batch = next(plain), next(mixed)
        for row, source in enumerate(batch.source_ids.tolist()):
            assert (batch.prefix_lengths[row] is None) == (source != 2)
            assert (batch.weights[row] is None) == (source == 1)
            if source == 1:  # byte for byte as if there were no objectives
                assert batch.digests[row] == expected.digests[row]


def test_token_files_take_all_but_fim(data_config: Make, tokenizer: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([5, 6, 7, 8, 9, 10, 11, 0] * 4000, np.uint16))
    sources = [{"name": "s", "paths": [str(tmp_path)]}]
    with pytest.raises(ConfigError, match=r"source 's': objectives: fim works on text, but .*x.npy holds token ids"):
        Scheduler(data_config(tokenizer=tokenizer, sources=sources, objectives=[FIM]))
    batch = next(Scheduler(data_config(tokenizer=tokenizer, sources=sources, objectives=[PREFIX])))
    assert any(prefixes is not None and prefixes.any() for prefixes in batch.prefix_lengths)


def test_the_token_cache_does_not_matter(data_config: Make, encoder: Encoder, tokenizer: str, tmp_path: Path) -> None:
    def digests(cache: Path | None) -> list[list[bytes]]:
        config = data_config(tokenizer=tokenizer, objectives=[CAUSAL, SPANS, PREFIX], token_cache=cache and str(cache))
        scheduler = Scheduler(config, encoder=encoder)
        return [next(scheduler).digests for _ in range(3)]

    assert digests(tmp_path) == digests(tmp_path) == digests(None)


def test_a_learned_control_token_carries_no_loss_where_it_is_seen_ahead(
    data_config: Make, encoder: Encoder, tokenizer: str, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(make_documents("x", 300, 0)))
    control = {"kind": "prefix", "tokens": ["<|good|>"], "learned": True}
    sources = [{"name": "s", "paths": [str(tmp_path)], "transforms": [control]}]
    config = data_config(tokenizer=tokenizer, sources=sources, objectives=[PREFIX, CAUSAL])
    documents = given_documents([next(Scheduler(config, encoder=encoder))])
    assert {prefix > 0 for *_, prefix in documents} == {True, False}
    for _, tokens, weights, prefix in documents:
        assert tokens[0] == encoder.special_id("<|good|>")
        assert weights == [0.0] * prefix + [1.0] * (len(tokens) - prefix)


def test_a_run_keeps_its_objectives(data_config: Make, tokenizer: str, tmp_path: Path) -> None:
    next(Scheduler(data_config(tokenizer=tokenizer, objectives=[SPANS]), run_dir=tmp_path))
    next(Scheduler(data_config(tokenizer=tokenizer, objectives=[SPANS]), run_dir=tmp_path))
    with pytest.raises(ConfigError, match=r"data.objectives are others than the run in"):
        Scheduler(data_config(tokenizer=tokenizer, objectives=[CAUSAL]), run_dir=tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "{question}"}, "choose what carries loss or move text, and so do prompt and masked_key"),
        ({"masked_key": "mask"}, "give source s `objectives: \\[\\]`"),
        ({"transforms": [{"kind": "fim"}]}, "make fim one of the objectives"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(fields: dict[str, Any], said: str) -> None:
    raw = {"tokenizer": "t", "sources": [{"name": "s", "paths": ["x"], **fields}], "objectives": [SPANS]}
    with pytest.raises(ConfigError, match=said) as caught:
        validated(DataConfig, raw, "run.yaml")
    assert "\n" not in str(caught.value)
    raw["sources"][0]["objectives"] = []
    validated(DataConfig, raw, "run.yaml")


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"kind": "span_corruption", "sentinel": "<x>"}, "must hold {} once"),
        ({"kind": "prefix_lm", "min_share": 0.6, "max_share": 0.5}, "min_share is above max_share"),
        ({"kind": "fim", "prefix_token": "<p>"}, "belong together"),
        ({"kind": "causal", "weight": 0.0}, "greater than 0"),
    ],
)
def test_an_objective_that_cannot_be_is_refused_in_one_line(objective: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        validated(SourceConfig, {"name": "s", "paths": ["x"], "objectives": [objective]}, "run.yaml")
    assert "\n" not in str(caught.value)
