"""Span corruption and prefix LM: what a document becomes, and which of its tokens carry loss, worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scheduler.objectives.config import PrefixLmObjective, SpanCorruptionObjective, Ul2Objective
from data_scheduler.objectives.prefix_lm import PrefixLm, prefix_length
from data_scheduler.objectives.span_corruption import SpanCorruption, Spans, corrupt, piece_tokens, spans_of
from data_scheduler.order import draws
from headrace.errors import ConfigError

EOS, MODE, FIRST_SENTINEL = 900, 901, 1000


class Special:
    """The special tokens of a tokenizer with `count` sentinels."""

    eos_id = EOS

    def __init__(self, count: int = 100) -> None:
        self.ids = {f"<extra_id_{number}>": FIRST_SENTINEL + number for number in range(count)} | {"[R]": MODE}

    def special_id(self, name: str) -> int | None:
        return self.ids.get(name)


def objective(**fields: object) -> SpanCorruptionObjective:
    return SpanCorruptionObjective.model_validate({"kind": "span_corruption", **fields})


def test_the_example_of_the_documentation() -> None:
    # 3 of 8 tokens in 2 spans. The smaller of the first two draws is the second: the spans are 2 and 1 long; of the
    # four draws that cut what stays, 5 tokens, again the second: 2 and 3 long.
    numbers = np.array([9, 1, 0, 7, 2, 8, 6, 0], np.uint64)
    assert spans_of(8, 3 / 8, 1.5) == Spans(3, 2)
    left, out = corrupt(np.array(list(b"abcdefgh"), np.uint32), Spans(3, 2), [1000, 1001], numbers)
    assert left.tolist() == [*b"ab", 1000, *b"efg", 1001]
    assert out.tolist() == [1000, *b"cd", 1001, *b"h"]


def test_the_loss_is_on_the_target_alone() -> None:
    made, seen = SpanCorruption(objective(rate=3 / 8, mean_span=1.5, mode_token="[R]"), Special(), "s").apply(
        np.array(list(b"abcdefgh"), np.uint32), np.array([9, 1, 0, 7, 2, 8, 6, 0], np.uint64)
    )
    assert [(tokens.tolist(), learned) for tokens, learned in made] == [
        ([MODE, *b"ab", 1000, *b"efg", 1001], False),
        ([1000, *b"cd", 1001, *b"h"], True),
    ]
    assert seen == 0


def test_spans_are_as_in_t5() -> None:
    # Numbers of random_spans_noise_mask: round(568 · 0.15) = 85, round(85 / 3) = 28.
    assert spans_of(568, 0.15, 3.0) == Spans(85, 28)
    assert spans_of(3, 0.15, 3.0) == Spans(0, 0)
    assert spans_of(4, 0.15, 3.0) == Spans(1, 1)
    assert spans_of(1, 0.9, 3.0) == Spans(0, 0)
    assert spans_of(10, 0.9, 1.0) == Spans(9, 1)  # one token stays, so there is one span


@given(
    length=st.integers(0, 300),
    rate=st.floats(0.02, 0.95),
    mean_span=st.floats(1.0, 70.0),
    context=st.integers(16, 200),
    seed=st.integers(0, 99),
    mode=st.booleans(),
)
def test_every_document_can_be_put_together_again(
    length: int, rate: float, mean_span: float, context: int, seed: int, mode: bool
) -> None:
    config = objective(
        rate=rate, mean_span=mean_span, context_tokens=context, mode_token="[R]" if mode else None, bidirectional=True
    )
    document = np.arange(length, dtype=np.uint32)
    made, seen = SpanCorruption(config, Special(200), "s").apply(document, draws(length, seed))
    assert seen == (len(made[0][0]) if made and not made[0][1] else 0)
    again: list[int] = []
    pieces = list(made)
    while pieces:
        tokens, learned = pieces.pop(0)
        size = len(tokens)
        if not learned:
            assert tokens.tolist()[: int(mode)] == [MODE] * int(mode)
            target = pieces.pop(0)[0]
            size += len(target)
            spans: dict[int, list[int]] = {}
            for token in target.tolist():
                if token >= FIRST_SENTINEL:
                    spans[token] = []
                elif token != EOS:
                    spans[max(spans)].append(token)
            assert list(spans) == [FIRST_SENTINEL + number for number in range(len(spans))]
            assert all(spans.values())
            for token in tokens.tolist()[int(mode) :]:
                again += spans.pop(token) if token >= FIRST_SENTINEL else [token]
            assert not spans
        else:
            again += [token for token in tokens.tolist() if token != EOS]
        assert size + (not pieces) <= context  # the last one is closed outside
    assert again == document.tolist()


def test_the_budget_is_used_up() -> None:
    config = objective(context_tokens=512)
    size = piece_tokens(config)
    (left, _), (out, _), *_ = SpanCorruption(config, Special(), "s").apply(
        np.arange(size + 5, dtype=np.uint32), draws(size + 5, 0)
    )[0]
    assert 509 <= len(left) + len(out) <= 512


def test_too_few_sentinels_are_told_with_their_number() -> None:
    with pytest.raises(ConfigError, match=r"source 's': .* takes up to 23 sentinels for 512 tokens, .* has 7 ") as told:
        SpanCorruption(objective(), Special(7), "s")
    assert "\n" not in str(told.value)
    with pytest.raises(ConfigError, match=r"mode token '\[X\]' is no special token"):
        SpanCorruption(objective(mode_token="[X]"), Special(), "s")


def test_ul2_is_the_table_of_the_paper() -> None:
    *spans, last = Ul2Objective(kind="ul2", weight=7.0).denoisers
    assert [(one.mean_span, one.rate, one.mode_token) for one in spans] == [  # type: ignore[union-attr]
        (3, 0.15, "[R]"), (8, 0.15, "[R]"),
        (3, 0.5, "[X]"), (8, 0.5, "[X]"), (64, 0.15, "[X]"), (64, 0.5, "[X]"),
    ]  # fmt: skip
    assert isinstance(last, PrefixLmObjective)
    assert (last.mode_token, last.min_share, last.max_share) == ("[S]", 0.5, 1.0)
    assert [one.weight for one in [*spans, last]] == pytest.approx([1.0] * 7)


def test_a_prefix_leaves_something_to_read_and_to_predict() -> None:
    config = PrefixLmObjective(kind="prefix_lm", context_tokens=20)
    lengths = {prefix_length(100, config, draw) for draw in draws(2000, 1)}
    assert lengths == set(range(1, 20))
    assert {prefix_length(2, config, draw) for draw in draws(50, 1)} == {1}
    assert prefix_length(1, config, np.uint64(0)) == 0
    narrow = PrefixLmObjective(kind="prefix_lm", min_share=0.25, max_share=0.5)
    assert {prefix_length(8, narrow, draw) for draw in draws(200, 1)} == {2, 3, 4}


def test_a_prefix_is_read_and_the_rest_predicted() -> None:
    config = PrefixLmObjective(kind="prefix_lm", min_share=0.5, max_share=0.5, mode_token="[R]")
    for both in (True, False):
        made, seen = PrefixLm(config.model_copy(update={"bidirectional": both}), Special(), "s").apply(
            np.arange(8, dtype=np.uint32), draws(8, 0)
        )
        assert [(tokens.tolist(), learned) for tokens, learned in made] == [
            ([MODE, 0, 1, 2, 3], False),
            ([4, 5, 6, 7], True),
        ]
        assert seen == (5 if both else 0)
