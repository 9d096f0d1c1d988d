"""Words and sentences without models: what datatrove's filters and deduplication count with."""

import re

from datatrove.utils.text import TERMINAL_PUNCTUATION
from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer

from headrace.errors import ConfigError

WORD = re.compile(r"\w+(?:['’]\w+)*")
"""A word of the vocabulary: punctuation is never part of one."""
_TOKEN = re.compile(r"\w(?:\S*\w)?|[^\w\s]")
_END = re.escape("".join(sorted(TERMINAL_PUNCTUATION)))
# To terminal punctuation that a space or the line's end follows, else to the end of the line.
_SENTENCE = re.compile(rf"\S(?:.*?[{_END}]+[\"'”’)\]]*(?=\s|$)|.*)", re.MULTILINE)


class PlainWords(WordTokenizer):
    """Words stand between spaces; punctuation before and after a word, but not inside, counts as words of its own.

    So does spaCy, datatrove's default for English, which also splits contractions: "don't" is one word here, two there.
    """

    def word_tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:stop] for start, stop in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(found.start(), found.start() + len(found[0].rstrip())) for found in _SENTENCE.finditer(text)]


def word_tokenizer(words: str) -> WordTokenizer:
    """The word tokenizer of the setting `words`. Raises ConfigError when datatrove has none or cannot load it."""
    if words == "plain":
        return PLAIN
    try:
        return load_word_tokenizer(words)
    except ImportError as error:
        raise ConfigError(f"words: {words!r}: {error} or use `plain`") from None
    except ValueError:
        raise ConfigError(f"words: {words!r} is not `plain` and no language code that datatrove knows") from None


PLAIN = PlainWords("plain")
