"""The share of unusual words, in three passes: count in every task, merge, score."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import zstandard
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep

from data_scheduler.prep.words import WORD

FREQUENT = "frequent.txt"


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return WORD.findall(text.lower())


class CountWords(PipelineStep):
    """Writes `counts/<rank>.zst`: lines of word and count, a word once."""

    type = "count"
    name = "words"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = DataFolder(folder)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        counts: Counter[str] = Counter()
        for document in data:
            counts.update(words_of(document.text))
            yield document
        lines = "".join(f"{word}\t{counts[word]}\n" for word in sorted(counts))
        with self.folder.open(f"counts/{rank:05d}.zst", "wb") as file:
            file.write(zstandard.compress(lines.encode()))


class MergeCounts(PipelineStep):
    """Writes the `frequent` most frequent words of all tasks, ties in alphabetical order. Holds all words in memory."""

    type = "count"
    name = "frequent words"

    def __init__(self, folder: str, frequent: int) -> None:
        super().__init__()
        self.folder, self.frequent = DataFolder(folder), frequent

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        counts: Counter[str] = Counter()
        for name in self.folder.list_files("counts"):
            with self.folder.open(name, "rb") as file:
                lines = zstandard.decompress(file.read()).decode().split("\n")[:-1]
            for word, _, count in (line.partition("\t") for line in lines):
                counts[word] += int(count)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))[: self.frequent]
        with self.folder.open(FREQUENT, "wb") as file:
            file.write("\n".join(ranked).encode())


class RareWords(PipelineStep):
    """Adds `rare_word_share`; 0 for a text without words."""

    type = "score"
    name = "rare words"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = DataFolder(folder)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with self.folder.open(FREQUENT, "rb") as file:
            frequent = set(file.read().decode().split("\n"))
        for document in data:
            words = words_of(document.text)
            rare = sum(word not in frequent for word in words)
            document.metadata["rare_word_share"] = rare / max(1, len(words))
            yield document
