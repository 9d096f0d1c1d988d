"""How our plots look, and where they are drawn: on no screen, into a PNG file.

with picture("report.png", figsize=(10, 5.6)) as figure:
    axes = figure.subplots()
    ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError

# Okabe and Ito's colours, told apart with any kind of colour blindness; their yellow is left out, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", ":")
"""With more lines than colours, the colours come again with the next style."""

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
}


@contextmanager
def picture(path: str | Path, **figure_options: Any) -> Iterator[Any]:
    """An empty matplotlib figure; what is in it at the end becomes the PNG `path`.

    Raises ConfigError without matplotlib, OSError when the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("the plot needs matplotlib; pip install 'headrace[train]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        figure = plt.figure(layout="constrained", **figure_options)
        try:
            yield figure
            figure.savefig(str(path), format="png")
        finally:
            plt.close(figure)
