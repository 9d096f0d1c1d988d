"""Shapes of the weights of whole models, for operators over all of them. No cases of its own."""

from collections.abc import Iterator

from kernel_cases.case import Case

# name → (hidden size, width of the MLP, vocabulary, layers): quickstart's size, and a model of 26M.
MODELS = {"3M": (256, 704, 2048, 4), "26M": (512, 1408, 8192, 6)}


def shapes(model: str) -> list[tuple[int, ...]]:
    """Of a llama-like model of that size, in order."""
    hidden, width, vocabulary, layers = MODELS[model]
    block = [(hidden,), (3 * hidden, hidden), (hidden, hidden), (hidden,), (2 * width, hidden), (hidden, width)]
    return [(vocabulary, hidden), *(shape for _ in range(layers) for shape in block), (hidden,), (vocabulary, hidden)]


def cases() -> Iterator[Case]:
    return iter(())
