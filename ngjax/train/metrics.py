"""What a run measured, as a file with one JSON object per line."""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Row: TypeAlias = dict[str, int | float | None]
"""One logged step: `step` and named numbers."""


def read_metrics(path: str | os.PathLike[str], *, last_step: int | None = None) -> list[Row]:
    """The rows of a metrics file, in order.

    A last line without its end, as a killed run leaves it, is passed over.

    Args:
      path: the file; one that does not exist has no rows.
      last_step: leaves out the rows of later steps.

    Raises:
      ValueError: a line is not a row; the message names file and line.
    """
    path = pathlib.Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            wanted = last_step is None or row["step"] <= last_step
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a row of metrics: {line!r}") from error
        if wanted:
            rows.append(row)
    return rows


class MetricsFile:
    """Appends rows to a file, each handed to the system before `write` returns.

    Args:
      path: the file.
      rows: what it holds at first, in place of what it held before. A resumed run passes the rows
        up to its checkpoint, as it will log the later ones again.
    """

    def __init__(self, path: str | os.PathLike[str], rows: Sequence[Row] = ()) -> None:
        path = pathlib.Path(path)
        # Through a second name: a kill at this moment must not cost the rows that stay.
        written = path.with_name(path.name + ".tmp")
        written.write_text("".join(map(_line, rows)))
        written.replace(path)
        self._file = path.open("a")

    def write(self, row: Mapping[str, int | float | None]) -> None:
        """Appends one row; numbers that JSON does not have (NaN, infinity) become null."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(row: Mapping[str, int | float | None]) -> str:
    finite = {name: value if value is None or math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
