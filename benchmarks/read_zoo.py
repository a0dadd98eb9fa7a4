"""What does reading a zoo of many networks cost, next to arrays in memory?

Writes a zoo of random SIRENs (2-32-32-1) and reads it: opening, single networks, and mini-batches of random rows, which
are compared with NumPy's indexing of the same rows of arrays in memory, in turns in the same run.

    python benchmarks/read_zoo.py --networks 100000

Prints a table. Just written, the files are still in the system's cache, as they are from the second epoch on where
memory suffices; the first pass over a zoo that is larger or new costs what the disk costs. Compare the rows of one run
with each other, not with other machines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tyro

import ngjax
from ngjax import zoo

SPEC = ngjax.mlp_spec((2, 32, 32, 1), activation="siren")
NETWORK_BYTES = sum(4 * int(np.prod(param.shape)) for param in SPEC.params)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    networks: int = 100_000
    """How many there are in the zoo."""
    shard_rows: int = 4_000
    """Networks per shard."""
    batch_size: int = 128
    """Rows of a mini-batch."""
    batches: int = 400
    """How many mini-batches are read; the table has medians."""
    singles: int = 20_000
    """How many networks are read one by one."""
    dir: pathlib.Path | None = None
    """Where to make the folder of the zoo, which is deleted again; the system's for temporary files by default."""
    seed: int = 0
    """Of the weights and of the rows that are read."""


def main(config: Config) -> dict[str, float]:
    """Returns the numbers of the table."""
    rng = np.random.default_rng(config.seed)
    with tempfile.TemporaryDirectory(dir=config.dir, prefix="read_zoo_") as folder:
        results = {"write": write_zoo(config, pathlib.Path(folder), rng)}
        before = resident_memory()
        results["open"] = median_seconds(lambda: zoo.open(folder), [()] * 5)
        opened = zoo.open(folder)
        results["labels"] = timed(lambda: opened.labels)
        singles = rng.integers(len(opened), size=config.singles)
        results["first_singles"] = timed(lambda: visit(opened, singles)) / len(singles)
        results["singles"] = timed(lambda: visit(opened, singles)) / len(singles)
        batches = [(rng.integers(len(opened), size=config.batch_size),) for _ in range(config.batches)]
        for (rows,) in batches:
            opened.read(rows)
        results["own_memory"], results["file_pages"] = (resident_memory() - before).tolist()
        leaves = SPEC.flatten(opened.read(np.arange(len(opened))))
        results["read"], results["memory"] = medians_in_turns(
            [opened.read, lambda rows: [leaf[rows] for leaf in leaves]], batches
        )
        results["verify"] = timed(opened.verify)
        print("\n".join(table(config, opened, results)))
    return results


def write_zoo(config: Config, folder: pathlib.Path, rng: np.random.Generator) -> float:
    """Seconds, without making the weights."""
    seconds = 0.0
    with zoo.ZooWriter(folder, categories={"split": ("train", "test")}) as writer:
        while len(writer) < config.networks:
            rows = min(config.shard_rows, config.networks - len(writer))
            params = SPEC.unflatten([rng.random((rows, *param.shape), np.float32) for param in SPEC.params])
            labels = {
                "label": rng.integers(10, size=rows, dtype=np.int32),
                "image": np.arange(rows, dtype=np.int32),
                "split": rng.integers(2, size=rows, dtype=np.int32),
                "psnr": rng.random(rows, np.float32),
            }
            seconds += timed(lambda params=params, labels=labels: writer.append(SPEC, params, labels))
    return seconds


def visit(opened: zoo.Zoo, rows: np.ndarray) -> None:
    for row in rows:
        opened[row]


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median_seconds(function: Callable[..., Any], calls: list[tuple]) -> float:
    return medians_in_turns([function], calls)[0]


def medians_in_turns(functions: list[Callable[..., Any]], calls: list[tuple]) -> list[float]:
    """Median of the seconds of each function, called in turns so that all see the same machine."""
    times = np.empty((len(calls), len(functions)))
    for i, arguments in enumerate(calls):
        for j, function in enumerate(functions):
            times[i, j] = timed(lambda function=function, arguments=arguments: function(*arguments))
    return np.median(times, axis=0).tolist()


def resident_memory() -> np.ndarray:
    """Bytes of this process' own, and of files that it looks at and the system takes back when it needs room."""
    bytes_of = dict.fromkeys(("RssAnon", "RssFile"), math.nan)
    with contextlib.suppress(OSError):  # only Linux says
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in bytes_of:
                bytes_of[name] = 1024.0 * int(value.split()[0])
    return np.array(list(bytes_of.values()))


def table(config: Config, opened: zoo.Zoo, results: dict[str, float]) -> Iterator[str]:
    count, size = len(opened), sum(path.stat().st_size for path in opened.path.iterdir())

    def row(name: str, value: str, note: str = "") -> str:
        return f"  {name:32s}{value:>22s}{note}"

    def speed(networks: int, size: float, seconds: float) -> tuple[str, str]:
        return f"{networks / seconds:,.0f} networks/s", f"{size / seconds / 1e9:10.2f} GB/s"

    yield f"{count:,} networks 2-32-32-1 in shards of {config.shard_rows:,}, {size / 1e6:,.0f} MB"
    yield row("write, synced to disk", *speed(count, size, results["write"]))
    yield row("open", f"{1e3 * results['open']:.1f} ms")
    yield row("all labels", f"{1e3 * results['labels']:.1f} ms")
    yield row("zoo[i], first time", f"{1e6 * results['first_singles']:.1f} us")
    yield row("zoo[i]", f"{1e6 * results['singles']:.1f} us")
    batch = config.batch_size
    yield row(f"zoo.read of {batch} rows", *speed(batch, batch * NETWORK_BYTES, results["read"]))
    yield row("the same rows in memory", *speed(batch, batch * NETWORK_BYTES, results["memory"]))
    yield row("time over that in memory", f"{results['read'] / results['memory']:.2f}")
    yield row("verify", *speed(count, size, results["verify"]))
    yield row("memory reading took", f"{results['own_memory'] / 1e6:,.0f} MB")
    yield row("pages of the files beside it", f"{results['file_pages'] / 1e6:,.0f} MB")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
