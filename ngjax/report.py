"""Tables and pictures as scripts leave them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ngjax.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, titles: int = 1) -> str:
    """A table in Markdown that can be read as it is: the first columns, `titles` of them, to the left, others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [*map(str.ljust, cells[:titles], widths), *map(str.rjust, cells[titles:], widths[titles:])]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * width for width in widths[:titles]] + ["-" * (width - 1) + ":" for width in widths[titles:]]
    return "\n".join(map(line, (header, rule, *rows)))


def deviation_of(values: Sequence[float]) -> float | None:
    """Standard deviation with Bessel's correction; a single value has none."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def with_deviation(value: float, deviation: float | None, style: str) -> str:
    """`value ± deviation`, both in this format; without one the value alone."""
    return format(value, style) + ("" if deviation is None else f" ± {deviation:{style}}")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure of `pyplot` as a PNG that is there whole or not at all, and closes it."""
    from matplotlib import pyplot as plt  # an extra, which only scripts need

    with write_atomically(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=130, bbox_inches="tight", facecolor="white")
    plt.close(figure)
