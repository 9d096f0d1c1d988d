"""The `transforms` of a source: what each is told, and which do not go together."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_scheduler.strict_model import StrictModel
from data_scheduler.template import template_parts

Rate = Annotated[float, Field(ge=0.0, le=1.0)]
TOKEN_FORMATS = ("npy", "megatron", "ds")


class WeightedTemplate(StrictModel):
    """One of several templates of a source."""

    template: str
    """Text made of fields, as a source's `template`."""
    prompt: str | None = None
    """Text of fields before it that carries no loss, as a source's `prompt`."""
    weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """Share of the documents that get this template, on any scale."""

    @model_validator(mode="after")
    def _is_understood(self) -> "WeightedTemplate":
        for template in (self.template, self.prompt):
            if template is not None:
                template_parts(template)
        return self


class TemplatesTransform(StrictModel):
    """Several templates, one drawn for each document in each epoch; in the place of `template` and `prompt`."""

    kind: Literal["templates"]
    templates: Annotated[list[WeightedTemplate], Field(min_length=1)]
    """The templates; a record must have the fields of all of them."""


class FimTransform(StrictModel):
    """Fill in the middle (arXiv 2207.14255): a document is cut at two random characters into prefix, middle and suffix,
    and its middle put last, with the tokenizer's sentinel tokens before the three."""

    kind: Literal["fim"]
    rate: Rate = 0.5
    """Share of the documents that are transformed; the others stay as they are."""
    spm_rate: Rate = 0.5
    """Of those, the share with the suffix first (SPM); the others have the prefix first (PSM)."""
    context_characters: Annotated[int, Field(ge=16)] | None = None
    """A longer document is taken in pieces of so many characters, each drawn and cut for itself and closed with the
    end-of-document token, as if it had been cut into contexts first; null: documents are taken whole."""
    prefix_token: str | None = None
    """Special token before the prefix; with null for all three, the first known family of names that there is:
    `<|fim_prefix|>`, `<fim_prefix>`, `<｜fim▁begin｜>`."""
    middle_token: str | None = None
    """Special token before the middle."""
    suffix_token: str | None = None
    """Special token before the suffix."""

    @model_validator(mode="after")
    def _all_or_none(self) -> "FimTransform":
        if len({token is None for token in (self.prefix_token, self.middle_token, self.suffix_token)}) > 1:
            raise ValueError("prefix_token, middle_token and suffix_token belong together: give all three or none")
        return self


class BpeDropoutTransform(StrictModel):
    """BPE-dropout (arXiv 1910.13267): every merge that could be made next is left out with probability `p`, so that a
    word is cut differently each time. For BPE tokenizers."""

    kind: Literal["bpe_dropout"]
    p: Rate
    """Probability; the paper's choice is 0.1. 0 gives the tokenizer's own tokens, 1 single bytes or characters."""


class PrefixTransform(StrictModel):
    """Control tokens or text before a document, after its beginning-of-sequence token (CTRL, arXiv 1909.05858; metadata
    conditioning, arXiv 2501.01956)."""

    kind: Literal["prefix"]
    tokens: list[str] = []
    """Names of special tokens."""
    text: str | None = None
    """Text after them, encoded by itself; may name fields: `"{url}\\n"`."""
    rate: Rate = 1.0
    """Share of the documents that get it; the others teach the model to do without."""
    learned: bool = False
    """Whether the prefix carries loss."""

    @model_validator(mode="after")
    def _is_something(self) -> "PrefixTransform":
        if not self.tokens and not self.text:
            raise ValueError("give tokens or text")
        if self.text is not None:
            template_parts(self.text, needs_field=False)
        return self

    @property
    def parts(self) -> list[tuple[str, str]]:
        """(literal, field) pairs of its text."""
        return template_parts(self.text, needs_field=False) if self.text else []


Transform = Annotated[
    TemplatesTransform | FimTransform | BpeDropoutTransform | PrefixTransform, Field(discriminator="kind")
]


def check_together(transforms: Sequence[Any], source: Any) -> None:
    """Raise ValueError when a source's transforms do not go together or with its other settings."""
    kinds = [transform.kind for transform in transforms]
    for kind in ("templates", "fim", "bpe_dropout"):
        if kinds.count(kind) > 1:
            raise ValueError(f"transforms: {kind} is there twice; give it once")
    if "templates" in kinds and (source.template or source.prompt or source.masked_key):
        raise ValueError(
            "transforms: templates takes the place of template and prompt, and masked_key counts characters of one "
            "text only; leave these keys out"
        )
    prompts = any(choice.prompt for one in transforms if one.kind == "templates" for choice in one.templates)
    if "fim" in kinds and (source.prompt or source.masked_key or prompts):
        raise ValueError("transforms: fim moves text around, so it cannot be used with prompt or masked_key")
    if source.format in TOKEN_FORMATS and needs_text(transforms):
        raise ValueError(text_is_needed(transforms, f"format {source.format}"))


def needs_text(transforms: Sequence[Any]) -> bool:
    """Whether a transform asks for a document's text or fields, not just for its tokens."""
    return any(one.kind != "prefix" or any(field for _, field in one.parts) for one in transforms)


def text_is_needed(transforms: Sequence[Any], where: str) -> str:
    """Why data that was tokenized before cannot be transformed."""
    kinds = ", ".join(dict.fromkeys(one.kind for one in transforms if needs_text([one])))
    return f"transforms: {kinds} work on text, but {where} holds token ids; give the raw text, or leave them out"
