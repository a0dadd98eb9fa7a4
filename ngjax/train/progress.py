"""How far a run is: a bar on a terminal, otherwise a plain line now and then."""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

_SECONDS_BETWEEN_DRAWS = 0.1
_SECONDS_BETWEEN_LINES = 30.0
_BAR_WIDTH = 24


@runtime_checkable
class TextStream(Protocol):
    """The part of a text file that is used here."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> object: ...
    def isatty(self) -> bool: ...


class Progress:
    """Shows steps, loss, rate and time left on a stream.

    The rate, and with it the time left, is that of the steps alone: it leaves out the first step,
    which compiles, and what happens under `paused`.

    Args:
      num_steps: of the whole run.
      stream: where to write; a terminal gets a bar, `None` nothing.
      clock: seconds, from any origin.
    """

    def __init__(
        self,
        num_steps: int,
        stream: TextStream | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_steps = num_steps
        self._stream = stream
        self._clock = clock
        self._is_bar = stream is not None and stream.isatty()
        self._interval = _SECONDS_BETWEEN_DRAWS if self._is_bar else _SECONDS_BETWEEN_LINES
        self._last_print = -math.inf if self._is_bar else clock()
        # Set by the first update: the end of the timed stretch, and what was timed so far.
        self._mark: float | None = None
        self._steps = 0
        self._seconds = 0.0

    def update(self, step: int, loss: float) -> None:
        """Call after every step with the number of steps done and a recent loss."""
        now = self._clock()
        if self._mark is not None:
            self._seconds += now - self._mark
            self._steps += 1
        self._mark = now
        if now - self._last_print >= self._interval or step == self._num_steps:
            self._print(step, loss)
            self._last_print = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside does not count."""
        begin = self._clock()
        try:
            yield
        finally:
            if self._mark is not None:
                self._mark += self._clock() - begin

    def close(self) -> None:
        """Ends the line of the bar."""
        if self._is_bar and self._mark is not None:
            self._write("\n")

    def _print(self, step: int, loss: float) -> None:
        text = f"step {step}/{self._num_steps}  loss {loss:.4g}"
        if self._seconds > 0:
            rate = self._steps / self._seconds
            text += f"  {rate:.3g} steps/s  {as_time((self._num_steps - step) / rate)} left"
        if self._is_bar:
            filled = _BAR_WIDTH * step // self._num_steps
            text = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {text}"
            # Cut to the width: a line that wraps would not be overwritten by the next one.
            self._write(f"\r{text[: shutil.get_terminal_size().columns - 1]}\x1b[K")
        else:
            self._write(f"{text}\n")

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()


def as_time(seconds: float) -> str:
    """Minutes and seconds, after the hours where there are any: `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
