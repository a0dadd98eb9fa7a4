"""How much symmetry does the trace find? Published architectures at their full sizes, as a table.

    python scripts/trace_architectures.py --out docs/architectures

Each network is traced from the shapes of its parameters. Then it is initialized, perturbed and run, with its neurons as
they are and in a random order, which has to leave its outputs as they are.

Writes `results.json` and `table.md` into the output folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from architectures import ARCHITECTURES, Architecture, Network

import ngjax
from ngjax import train
from ngjax.files import write_atomically
from ngjax.machine import describe_process
from ngjax.report import markdown_table

TABLE_NOTES = """\
permutations: free ones that are independent of one another; one of its own for each head and each group.
hidden neurons moved: by them. Those that stay are tokens of mixers, rotary dimensions, what is not proven.
scalars placed: share of the parameters that are features of a neuron or an edge; the rest is loose.
deviation: largest change of an output, in units of its largest value, when the neurons of the perturbed network are put
  into a random order."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. The defaults are those of the README's table."""

    out: pathlib.Path
    """Folder for results.json and table.md."""
    only: tuple[str, ...] = ()
    """Names of architectures, all by default."""
    narrow: bool = False
    """The small versions that the tests use, for a quick look."""
    run: bool = True
    """Whether to run the networks too; large ones take minutes and gigabytes."""
    double: bool = False
    """Runs the networks in float64: what is left of a deviation there was rounding before."""
    seed: int = 0
    """Of parameters and permutations."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What came out for one architecture.

    Attributes:
      parameters: floating scalars, running statistics among them.
      permutations: that are independent of one another.
      log10_symmetries: of the number of orders that they allow together.
      hidden_neurons, moved_neurons: of all hidden node groups, and of those that move.
      pinned_axes: parameter axes longer than one along which nothing moves.
      pinned_hidden_axes: those of them that belong to hidden neurons, not to inputs, outputs or taps.
      pinned_by: how many axes each primitive pinned.
      deviation: largest change of an output in units of its largest value; `None` if it was not run.
      error: why there are no numbers.
    """

    name: str
    framework: str
    parameters: int = 0
    trace_seconds: float = 0.0
    permutations: int = 0
    log10_symmetries: float = 0.0
    hidden_neurons: int = 0
    moved_neurons: int = 0
    pinned_axes: int = 0
    pinned_hidden_axes: int = 0
    pinned_by: dict[str, int] = dataclasses.field(default_factory=dict)
    loose: int = 0
    deviation: float | None = None
    seconds: float = 0.0
    error: str = ""


def main(config: Config) -> dict[str, Any]:
    """Runs everything; returns what results.json holds."""
    out = train.prepare_folder(config.out)  # before any work: an unwritable folder fails here
    chosen = choose(config.only)
    start = time.perf_counter()
    rows: list[Row] = []
    for i, architecture in enumerate(chosen):
        print(f"[{i + 1}/{len(chosen)}] {architecture.name} ...", flush=True)
        rows.append(measure(architecture, config))
        passed = time.perf_counter() - start
        left = passed / len(rows) * (len(chosen) - len(rows))
        print(f"      {summary(rows[-1])}; {passed / 60:.1f} min, about {left / 60:.1f} left", flush=True)
        results = write_results(out, config, rows, passed)  # each time, so that a killed run leaves what it has
    print(f"\n{format_table(rows)}\n\n{TABLE_NOTES}\n\n{out / 'results.json'}, {out / 'table.md'}")
    return results


def choose(names: tuple[str, ...]) -> list[Architecture]:
    known = {architecture.name: architecture for architecture in ARCHITECTURES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names or known]


# -- one architecture -------------------------------------------------------------------------------------------------


def measure(architecture: Architecture, config: Config) -> Row:
    """The row of an architecture. A trace that fails is a result too."""
    start = time.perf_counter()
    row = Row(architecture.name, architecture.framework)
    try:
        network = architecture.narrow() if config.narrow else architecture.full()
        abstract = jax.eval_shape(network.init, jax.random.key(config.seed))
        before = time.perf_counter()
        spec = ngjax.trace_spec(network.apply, abstract, *network.inputs)
        row = dataclasses.replace(row, trace_seconds=round(time.perf_counter() - before, 2), **describe(spec))
        if config.run:
            row = dataclasses.replace(row, deviation=deviation(network, spec, config.seed, config.double))
    except Exception as error:
        row = dataclasses.replace(row, error=f"{type(error).__name__}: {error}".splitlines()[0])
    return dataclasses.replace(row, seconds=round(time.perf_counter() - start, 1))


def describe(spec: ngjax.NeuralGraphSpec) -> dict[str, Any]:
    """The numbers of a row that can be read off the spec."""
    free = [
        (action.size, math.prod(spec.action[id].size for id in action.per))
        for action in spec.actions
        if action.kind == "permutation"
    ]
    hidden = [group for group in spec.node_groups if group.role == "hidden"]
    lengths = {(ngjax.spec.format_path(p.path), axis): n for p in spec.params for axis, n in enumerate(p.shape)}
    pinned = [
        (entry, place)
        for entry in spec.pinned
        if not spec.is_free(entry.id)
        for place in entry.axes
        if lengths[place] > 1 and lengths[place] == spec.action[entry.id].size
    ]
    hidden_ids = {group.axis for group in hidden}
    return {
        "parameters": sum(math.prod(param.shape) for param in spec.params if param.is_floating),
        "permutations": sum(places for _, places in free),
        "log10_symmetries": round(sum(places * math.lgamma(size + 1) for size, places in free) / math.log(10), 1),
        "hidden_neurons": sum(group.size for group in hidden),
        "moved_neurons": sum(group.size for group in hidden if spec.is_free(group.axis)),
        "pinned_axes": len(pinned),
        "pinned_hidden_axes": sum(entry.id in hidden_ids for entry, _ in pinned),
        "pinned_by": dict(Counter(entry.reason for entry, _ in pinned).most_common()),
        "loose": spec.num_loose,
    }


def deviation(network: Network, spec: ngjax.NeuralGraphSpec, seed: int, double: bool) -> float:
    """Largest change of an output under random permutations of everything, in units of its largest value.

    As `ngjax.check_symmetry` measures it, in two runs: that also tries every parameter and every pinned axis.
    """
    # These random numbers compile faster than others, of which a large network has hundreds of arrays.
    params = jax.jit(network.init)(jax.random.key(seed, impl="rbg"))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: perturbed(rng, leaf), params)
    with jax.enable_x64(double):
        if double:
            params = jax.tree.map(doubled, params)
        run = jax.jit(network.apply)
        before = outputs(run(params, *network.inputs))
        perms = ngjax.random_permutations(jax.random.key(seed), spec)
        after = outputs(run(ngjax.permute_params(spec, perms, params), *network.inputs))
    if not all(np.all(np.isfinite(value)) for value in before):
        raise ValueError("the outputs of the perturbed network are not finite")
    return max(float(np.max(np.abs(a - b)) / (np.max(np.abs(a)) or 1)) for a, b in zip(before, after, strict=True))


def doubled(leaf: Any) -> Any:
    return np.asarray(leaf, np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def perturbed(rng: np.random.Generator, leaf: Any) -> Any:
    """The leaf away from its initialization, whose zeros, ones and small layer scales hide errors."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    values = np.asarray(leaf, np.float32)
    same = values.size == 0 or np.all(values == values.flat[0])
    noise = rng.random(values.shape, np.float32) if same else rng.standard_normal(values.shape, np.float32)
    scale = np.float32(0.3 if same else 0.5 * np.std(values))
    return (values + scale * noise).astype(leaf.dtype)


def outputs(results: Any) -> list[np.ndarray]:
    return [np.asarray(leaf).astype(np.float64) for leaf in jax.tree.leaves(results) if leaf.size]


# -- results ----------------------------------------------------------------------------------------------------------


def write_results(out: pathlib.Path, config: Config, rows: list[Row], seconds: float) -> dict[str, Any]:
    results = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "seconds": round(seconds, 1),
        **describe_process(),
        "config": {**dataclasses.asdict(config), "out": str(config.out), "only": list(config.only)},
    }
    with write_atomically(out / "results.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n")
    with write_atomically(out / "table.md") as path:
        path.write_text(f"{format_table(rows)}\n\n{TABLE_NOTES}\n")
    return results


def summary(row: Row) -> str:
    if row.error:
        return f"failed: {row.error}"
    return (
        f"traced in {row.trace_seconds:.1f} s, {row.permutations:,} permutations, {row.moved_neurons:,} of "
        f"{row.hidden_neurons:,} hidden neurons, deviation {'-' if row.deviation is None else f'{row.deviation:.1e}'}"
    )


def format_table(rows: list[Row]) -> str:
    """The results as a table in Markdown."""
    header = (
        "",
        "written in",
        "parameters",
        "traced in",
        "permutations",
        "hidden neurons moved",
        "hidden axes pinned",
        "scalars placed",
        "deviation",
    )
    return markdown_table(header, [(row.name, row.framework, *numbers(row)) for row in rows], titles=2)


def numbers(row: Row) -> tuple[str, ...]:
    if row.error:
        return (*("-" * 6), "failed")
    return (
        f"{row.parameters:,}",
        f"{row.trace_seconds:.1f} s",
        f"{row.permutations:,}",
        share(row.moved_neurons, row.hidden_neurons),
        f"{row.pinned_hidden_axes:,}",
        share(row.parameters - row.loose, row.parameters),
        "-" if row.deviation is None else f"{row.deviation:.0e}",
    )


def share(part: int, whole: int) -> str:
    """In percent; 100% is all of it, not nearly all."""
    percent = 100 * part / whole if whole else 100.0
    return "100%" if part == whole else f"{min(percent, 99.99):.2f}%"


if __name__ == "__main__":
    results = main(tyro.cli(Config, description=__doc__))
    failed = [row["name"] for row in results["rows"] if row["error"]]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
