"""The `objectives` of the data: what each is told, and what a source must be for them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_scheduler.strict_model import StrictModel
from data_scheduler.transforms.config import TOKEN_FORMATS, FimTransform, Rate

Weight = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
ContextTokens = Annotated[int, Field(ge=16)]
UL2_DENOISERS = ((3.0, 0.15), (8.0, 0.15), (3.0, 0.5), (8.0, 0.5), (64.0, 0.15), (64.0, 0.5))
"""(mean span, rate) of UL2's span corruption, its table 1: the first two are R, regular; the others X, extreme."""
REGULAR = 2


class CausalObjective(StrictModel):
    """Next-token prediction: every token of a document is predicted from those before it."""

    kind: Literal["causal"]
    weight: Weight = 1.0
    """Share of the documents that get it, on any scale."""


class PrefixLmObjective(StrictModel):
    """Prefix language modelling (T5, arXiv 1910.10683, section 3.2.1): a first part of a document is read, in both
    directions, and carries no loss; the rest is predicted."""

    kind: Literal["prefix_lm"]
    weight: Weight = 1.0
    """Share of the documents that get it, on any scale."""
    min_share: Rate = 0.0
    """The prefix is at least this share of the document,"""
    max_share: Rate = 1.0
    """and at most this; uniform in between, and at least one token is read and one predicted."""
    context_tokens: ContextTokens = 512
    """Of a longer document the shares are of its first so many tokens: no prefix is longer."""
    mode_token: str | None = None
    """Special token before the document that says which objective this is."""
    bidirectional: bool = True
    """Whether the tokens of the prefix see one another in both directions; else only their loss is left out."""

    @model_validator(mode="after")
    def _ascends(self) -> "PrefixLmObjective":
        if self.min_share > self.max_share:
            raise ValueError("min_share is above max_share")
        return self


class SpanCorruptionObjective(StrictModel):
    """Span corruption (T5, arXiv 1910.10683, section 3.1.4) for a decoder: spans of a document give way to sentinels,
    and after what is left of it stand the spans, each behind its sentinel. Only that second part carries loss."""

    kind: Literal["span_corruption"]
    weight: Weight = 1.0
    """Share of the documents that get it, on any scale."""
    rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the tokens that are taken out."""
    mean_span: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 3.0
    """Mean length of a span, in tokens."""
    context_tokens: ContextTokens = 512
    """A longer document is taken in pieces that make at most so many tokens, sentinels included; each is corrupted for
    itself and closed with the end-of-document token."""
    sentinel: str = "<extra_id_{}>"
    """Name of the special tokens that stand for spans; `{}` counts from 0."""
    mode_token: str | None = None
    """Special token before each piece that says which objective this is."""
    bidirectional: bool = False
    """Whether the input of a document's first piece is seen in both directions, as by an encoder."""

    @model_validator(mode="after")
    def _counts(self) -> "SpanCorruptionObjective":
        _check_sentinel(self.sentinel)
        return self


class FimObjective(StrictModel):
    """Fill in the middle (arXiv 2207.14255), as the transform `fim` does it with rate 1."""

    kind: Literal["fim"]
    weight: Weight = 1.0
    """Share of the documents that get it, on any scale."""
    spm_rate: Rate = 0.5
    """Of those, the share with the suffix first (SPM); the others have the prefix first (PSM)."""
    context_characters: Annotated[int, Field(ge=16)] | None = None
    """A longer document is taken in pieces of so many characters; null: whole."""
    prefix_token: str | None = None
    """Special token before the prefix; null for all three: as for the transform `fim`."""
    middle_token: str | None = None
    """Special token before the middle."""
    suffix_token: str | None = None
    """Special token before the suffix."""

    @property
    def transform(self) -> FimTransform:
        """The same as a transform. Raises pydantic's ValidationError."""
        return FimTransform(rate=1.0, **self.model_dump(exclude={"weight"}))

    @model_validator(mode="after")
    def _is_a_transform(self) -> "FimObjective":
        _ = self.transform
        return self


class Ul2Objective(StrictModel):
    """UL2's mixture of denoisers (arXiv 2205.05131, table 1), seven with equal shares, each behind the token of its
    mode: R, spans of 3 and 8 at 15 %; X, spans of 3 and 8 at 50 % and of 64 at 15 and 50 %; S, a prefix LM that
    predicts a quarter of the text on average."""

    kind: Literal["ul2"]
    weight: Weight = 1.0
    """Share of the documents that get one of the seven, on any scale."""
    context_tokens: ContextTokens = 512
    """As for `span_corruption` and `prefix_lm`."""
    sentinel: str = "<extra_id_{}>"
    """Name of the special tokens that stand for spans; `{}` counts from 0."""
    mode_tokens: Annotated[list[str], Field(min_length=3, max_length=3)] | None = ["[R]", "[S]", "[X]"]
    """Special tokens of the modes R, S and X; null: none, so that the model is not told."""
    bidirectional: bool = True
    """Whether inputs are seen in both directions, as in UL2's decoder; else only their loss is left out."""

    @model_validator(mode="after")
    def _counts(self) -> "Ul2Objective":
        _check_sentinel(self.sentinel)
        return self

    @property
    def denoisers(self) -> list[SpanCorruptionObjective | PrefixLmObjective]:
        """The seven."""
        r, s, x = (None, None, None) if self.mode_tokens is None else self.mode_tokens
        weight = self.weight / (len(UL2_DENOISERS) + 1)
        common = {"weight": weight, "context_tokens": self.context_tokens, "bidirectional": self.bidirectional}
        spans = [
            SpanCorruptionObjective.model_validate(
                {
                    **common,
                    "kind": "span_corruption",
                    "mean_span": mean_span,
                    "rate": rate,
                    "sentinel": self.sentinel,
                    "mode_token": r if number < REGULAR else x,
                }
            )
            for number, (mean_span, rate) in enumerate(UL2_DENOISERS)
        ]
        sequential = {**common, "kind": "prefix_lm", "min_share": 0.5, "mode_token": s}
        return [*spans, PrefixLmObjective.model_validate(sequential)]


Drawn = CausalObjective | PrefixLmObjective | SpanCorruptionObjective | FimObjective
Objective = Annotated[Drawn | Ul2Objective, Field(discriminator="kind")]


def drawn_from(objectives: Sequence[Any]) -> list[Drawn]:
    """The objectives with presets in parts."""
    return [each for one in objectives for each in (one.denoisers if isinstance(one, Ul2Objective) else [one])]


def sees_ahead(objectives: Sequence[Any]) -> bool:
    """Whether one of them lets tokens see later ones."""
    return any(getattr(one, "bidirectional", False) for one in objectives)


def moves_loss(objectives: Sequence[Any]) -> bool:
    """Whether one of them takes the loss from some tokens."""
    return any(one.kind not in ("causal", "fim") for one in objectives)


def needs_text(objectives: Sequence[Any]) -> bool:
    """Whether one of them works on a document's characters, not on its tokens."""
    return any(one.kind == "fim" for one in objectives)


def find_problem(objectives: Sequence[Any], source: Any) -> str | None:
    """Why a source cannot have the objectives, for people; None when it can."""
    advice = f"leave that out, or give source {source.name} `objectives: []`"
    if all(one.kind == "causal" for one in objectives):
        return None
    kinds = ", ".join(dict.fromkeys(one.kind for one in objectives if one.kind != "causal"))
    prompts = any(choice.prompt for one in source.transforms if one.kind == "templates" for choice in one.templates)
    if source.prompt or source.masked_key or prompts:
        return f"objectives: {kinds} choose what carries loss or move text, and so do prompt and masked_key; {advice}"
    if any(one.kind == "fim" for one in source.transforms):
        return f"objectives: {kinds} and the transform fim both rearrange; make fim one of the objectives, or {advice}"
    if needs_text(objectives) and source.format in TOKEN_FORMATS:
        return f"objectives: fim works on text, but format {source.format} holds token ids; {advice}"
    return None


def _check_sentinel(name: str) -> None:
    if name.count("{}") != 1 or "{" in name.replace("{}", ""):
        raise ValueError(f"sentinel: {name!r} must hold {{}} once, where the number goes, e.g. <extra_id_{{}}>")
