"""datatrove's language filter with a fastText model that is a file here, not a download."""

from functools import cached_property
from typing import Any

from datatrove.pipeline.filters import LanguageFilter
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.lid import FastTextLID

from data_scheduler.prep.config import LanguageStep
from headrace.errors import ConfigError


class LocalModel(FastTextLID):
    """datatrove's language model, loaded from a path when a task first needs it."""

    def __init__(self, path: str, languages: list[str] | None) -> None:
        super().__init__(languages)
        self.path = path

    @cached_property
    def model(self) -> Any:
        from fasttext.FastText import _FastText

        return _FastText(self.path)


def language_filter(step: LanguageStep, exclusion_writer: DiskWriter | None) -> LanguageFilter:
    """The filter block. Raises ConfigError when fastText is not installed."""
    try:
        block = LanguageFilter(step.languages, step.min_score, exclusion_writer)
    except ImportError as error:
        raise ConfigError(f"language: {error}") from None
    block.model = LocalModel(step.model, step.languages)
    return block


def check_model(path: str, key: str) -> None:
    """Raise ConfigError when `path` is no fastText model; the first four bytes of one are fixed."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ConfigError(
            f"{key}: {path}: {error.strerror}; download fastText's language model once, for example "
            f"{model_url()}, and give its path"
        ) from None
    if magic != b"\xba\x16\x4f\x2f":
        raise ConfigError(f"{key}: {path} is not a fastText model")


def model_url() -> str:
    """Where datatrove would download the model from."""
    from datatrove.utils.lid import FT176LID

    return str(FT176LID.MODEL_URL)
