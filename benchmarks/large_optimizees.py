"""What does an update of `ng_learned_opt` cost on large networks: is it linear in their parameters, does it fit?

The shipped `ng-gnn` on perceptrons of four equally wide layers from 1e4 to 2.5e7 parameters, and on a ResNet-50 (25.6
million) with its spec traced; the scalar rule `ff` and Adam beside it. Each row runs in a process of its own.
Parameters and state are donated, as in a training loop. On CPU the order of operations is the one that takes little
memory (`CPU_OPTIONS`) in place of XLA's default, which computes early all that several threads could.

    python benchmarks/large_optimizees.py --out large_optimizees.json

Prints a table: seconds to compile, milliseconds per update and nanoseconds per parameter, and the peak memory of the
process with everything in it (parameters, gradients, state, the optimizer's own arrays, Python).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import json
import math
import multiprocessing
import pathlib
import platform
import resource
import sys
import time
from typing import Any

import numpy as np
import tyro

from ngjax.files import write_atomically
from ngjax.machine import available_cores, processor_name

LAYERS = 4
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@dataclasses.dataclass(frozen=True)
class Config:
    """One table."""

    parameters: tuple[int, ...] = (10_000, 100_000, 1_000_000, 5_000_000, 25_000_000)
    """Of the perceptrons."""
    resnet: bool = True
    """Also a ResNet-50."""
    optimizers: tuple[str, ...] = ("ng-gnn", "ff", "adam")
    dtype: str = "float32"
    """Of the learned optimizers' computation."""
    chunk: int | None = None
    """Scalars that their perceptron sees at a time."""
    updates: int = 5
    """That the median is of, after one to warm up."""
    out: pathlib.Path | None = None
    """File for the results."""


def main(config: Config) -> None:
    networks = [f"perceptron, {n:.1e}" for n in config.parameters] + (["ResNet-50"] if config.resnet else [])
    rows = []
    for network in networks:
        for optimizer in config.optimizers:
            # A process for each, so that peak memory is its own.
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                row = pool.submit(measure, config, network, optimizer).result()
            rows.append({"network": network, "optimizer": optimizer, **row})
            print(f"{network}, {optimizer}: {row['milliseconds']:.1f} ms", file=sys.stderr, flush=True)
    table = format_table(rows)
    print(table)
    if config.out is not None:
        results = {
            "rows": rows,
            "config": {**dataclasses.asdict(config), "out": None},
            "machine": {"processor": processor_name(), "cores": available_cores(), "system": platform.platform()},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "table": table.splitlines(),
        }
        with write_atomically(config.out) as path:
            path.write_text(json.dumps(results, indent=2) + "\n")


def measure(config: Config, network: str, optimizer: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import optax

    import ngjax

    shapes, spec = resnet() if network == "ResNet-50" else perceptron(float(network.split()[-1]))
    settings = {"spec": spec, "dtype": config.dtype, "chunk": config.chunk}
    tx = optax.adam(1e-3) if optimizer == "adam" else ngjax.ng_learned_opt(optimizer, **settings)

    def step(params: Any, state: Any) -> Any:
        gradients = jax.tree.map(lambda leaf: 0.1 * leaf, params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.05 * rng.standard_normal(leaf.shape, np.float32)), shapes)
    state = tx.init(params)
    start = time.perf_counter()
    options = CPU_OPTIONS if jax.default_backend() == "cpu" else None
    compiled = jax.jit(step, donate_argnums=(0, 1), compiler_options=options).lower(params, state).compile()
    compile_seconds = time.perf_counter() - start
    times = []
    for _ in range(config.updates + 1):
        start = time.perf_counter()
        params, state = jax.block_until_ready(compiled(params, state))
        times.append(time.perf_counter() - start)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    seconds = float(np.median(times[1:]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return {
        "parameters": count,
        "compile_seconds": compile_seconds,
        "milliseconds": 1e3 * seconds,
        "nanoseconds_per_parameter": 1e9 * seconds / count,
        "peak_memory_gigabytes": peak,
    }


def perceptron(parameters: float) -> tuple[Any, Any]:
    """Shapes and spec."""
    import jax

    import ngjax

    spec = ngjax.mlp_spec((round(math.sqrt(parameters / LAYERS)),) * (LAYERS + 1))
    return spec.unflatten([jax.ShapeDtypeStruct(param.shape, param.dtype) for param in spec.params]), spec


def resnet() -> tuple[Any, Any]:
    """Shapes and spec."""
    import jax

    import ngjax

    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))
    from architectures.base import linen
    from architectures.convnets import ResNet

    network = linen(ResNet((3, 4, 6, 3), bottleneck=True), np.zeros((1, 224, 224, 3), np.float32))
    params = jax.eval_shape(network.init, jax.random.key(0))
    return params, ngjax.trace_spec(network.apply, params, *network.inputs)


def format_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | parameters | optimizer | ms per update | ns per parameter | peak memory | s to compile |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['network']} | {row['parameters']:,} | {row['optimizer']} | {row['milliseconds']:.1f} | "
        f"{row['nanoseconds_per_parameter']:.0f} | {row['peak_memory_gigabytes']:.2f} GB | "
        f"{row['compile_seconds']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Config))
