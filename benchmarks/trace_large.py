"""Is tracing linear in the number of equations, and do the groups of a large network fit?

Question 1: `trace_spec` of transformers with the blocks of GPT-2 XL (abstract weights) and of bottleneck ResNets, at
several depths: seconds, and seconds per equation.
Question 2: `to_groups` of a ResNet-50 (25.6 million parameters) with its spec known: seconds and memory after
compilation, beside a copy of the same parameters.

    python benchmarks/trace_large.py

Prints a table. On one core: `taskset -c 0 python benchmarks/trace_large.py`.
"""

import argparse
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ngjax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))
from architectures.base import Network, linen
from architectures.convnets import ResNet
from architectures.gpt import Sizes, gpt2


def transformer(depth: int) -> Network:
    """Blocks of GPT-2 XL: width 1600, 25 heads."""
    return gpt2(Sizes(depth=depth, width=1600, heads=25, hidden=6400, length=1024, vocabulary=50257), 1, 64)


def resnet(blocks: tuple[int, ...]) -> Network:
    return linen(ResNet(blocks, bottleneck=True), np.zeros((1, 224, 224, 3), np.float32))


def num_equations(jaxpr: Any) -> int:
    """Equations of a jaxpr, those of what it calls included."""
    called = (eqn.params.get(name) for eqn in jaxpr.eqns for name in ("jaxpr", "call_jaxpr"))
    return len(jaxpr.eqns) + sum(num_equations(getattr(inner, "jaxpr", inner)) for inner in called if inner is not None)


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result


def peak_memory() -> float:
    """GB that the process held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def trace_row(name: str, network: Network) -> ngjax.NeuralGraphSpec:
    params = jax.eval_shape(network.init, jax.random.key(0))
    start = time.perf_counter()
    spec = ngjax.trace_spec(network.apply, params, *network.inputs)
    took = time.perf_counter() - start
    making, jaxpr = seconds(lambda: jax.make_jaxpr(network.apply)(params, *network.inputs))
    count = num_equations(jaxpr.jaxpr)
    million = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    print(
        f"| {name:30} | {million:9.1f} | {count:9d} | {took:6.2f} | {making:8.2f} | {1e3 * took / count:10.2f} |",
        flush=True,
    )
    return spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    print(f"| {'trace_spec':30} | million   | equations | s      | jaxpr, s | ms each    |")
    print(f"| {'-' * 30} | --------: | --------: | -----: | -------: | ---------: |")
    trace_row("warm-up", transformer(1))
    for depth in (6, 12, 24, 48):
        trace_row(f"GPT-2 XL, {depth} of 48 blocks", transformer(depth))
    spec = trace_row("ResNet-50", resnet((3, 4, 6, 3)))
    trace_row("ResNet-101", resnet((3, 4, 23, 3)))
    trace_row("ResNet-152", resnet((3, 8, 36, 3)))

    rng = np.random.default_rng(0)
    params = spec.unflatten([jnp.asarray(rng.normal(size=p.shape), jnp.float32) for p in spec.params])
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) * 4 / 1e9
    groups = jax.jit(lambda p: ngjax.to_groups(spec, p)).lower(params).compile()
    copy = jax.jit(lambda p: jax.tree.map(lambda leaf: leaf + 1, p)).lower(params).compile()
    took, copied = (
        float(np.median([seconds(lambda: run(params))[0] for _ in range(args.repeats)]))  # noqa: B023
        for run in (groups, copy)
    )
    memory = groups.memory_analysis()
    needs = (memory.output_size_in_bytes + memory.temp_size_in_bytes) / 1e9
    print(f"\nto_groups of ResNet-50 ({size:.2f} GB of parameters): {took:.2f} s, {needs:.2f} GB for results and work")
    print(f"adding one to every parameter: {copied:.2f} s, ratio {took / copied:.1f}")
    print(f"peak memory of the process: {peak_memory():.2f} GB; jax {jax.__version__}")


if __name__ == "__main__":
    main()
