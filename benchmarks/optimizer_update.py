"""What does a step of a learned optimizer cost, against the PyTorch code of the same optimizers?

The rules are those of Kofinas et al. 2024, section 4.3 (NG-GNN: 64 features, 8 layers; NG-T: 32 features, 2 layers), on
their two convnets: 16-32-32 on images of 28 x 28 x 1 and 32-64-64 on 32 x 32 x 3, batches of 128, random images. Timed
are

    update       from parameters, gradients and momenta to new parameters
    gradient     loss and gradient of the optimizee, which no optimizer can save
    meta-step    gradient of the optimizee, update, loss and gradient behind it, and from there to the meta-parameters;
                 also less the two gradients of the optimizee

Each side runs in a process of its own with the same number of threads and the same environment:

    ngjax        this library
    PyTorch      a public reimplementation, from a checkout of github.com/lsbicego/learning-gnns, where one is given

    python benchmarks/optimizer_update.py --reference learning-gnns --out optimizer_update.json

The reference needs torch, torchvision, torch_geometric 2.3.1, omegaconf, einops and psutil. Compare the rows of one run
with each other, not with other machines.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import tyro

from ngjax.files import write_atomically
from ngjax.machine import available_cores, processor_name

SIDES = ("ngjax", "PyTorch")
MEASURES = ("update", "gradient", "meta-step")
SIZES = {"ng-gnn": (64, 8), "ng-t": (32, 2)}  # features, layers
BATCH_SIZE = 128
# What the reference imports and these optimizers do not use: text data sets, and what torch_geometric 2.3.1 has not.
NOT_NEEDED = {
    "datasets": "load_dataset",
    "transformers": "AutoTokenizer",
    "torch_geometric.nn.attention": "PerformerAttention",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One comparison."""

    reference: pathlib.Path | None = None
    """Checkout of the PyTorch code; without it only this library is run."""
    rules: tuple[str, ...] = tuple(SIZES)
    tasks: tuple[str, ...] = ("fashion-cnn-16-32-32", "cifar-cnn-32-64-64")
    threads: int = 2
    """Of PyTorch; this library takes the cores that the process may use."""
    chunk: int | None = 1024
    """Scalars that this library's perceptron sees at a time."""
    seconds: float = 5.0
    """That each measure is repeated for, at least three times."""
    out: pathlib.Path | None = None
    """File for the results."""


def main(config: Config) -> None:
    rows = []
    for rule, task, side in itertools.product(config.rules, config.tasks, SIDES):
        if side == "PyTorch" and config.reference is None:
            continue
        # A process for each, so that threads are its own.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            row = pool.submit(measure, config, rule, task, side).result()
        rows.append({"rule": rule, "task": task, "side": side, **row})
        print(f"{rule}, {task}, {side}: update {row['update']:.1f} ms", file=sys.stderr, flush=True)
    table = format_table(rows)
    print(table)
    if config.out is not None:
        results = {
            "rows": rows,
            "config": {**dataclasses.asdict(config), "reference": config.reference is not None, "out": None},
            "machine": {"processor": processor_name(), "cores": available_cores(), "system": platform.platform()},
            "allocator": os.environ.get("GLIBC_TUNABLES"),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "table": table.splitlines(),
        }
        with write_atomically(config.out) as path:
            path.write_text(json.dumps(results, indent=2) + "\n")


def measure(config: Config, rule: str, task: str, side: str) -> dict[str, Any]:
    """Median milliseconds of all measures, in this process."""
    made = reference_steps(config, rule, task) if side == "PyTorch" else our_steps(config, rule, task)
    row = {name: 1e3 * median_time(step, config.seconds) for name, step in zip(MEASURES, made, strict=True)}
    return {**row, "meta-step less gradients": row["meta-step"] - 2 * row["gradient"]}


def median_time(step: Callable[[], Any], seconds: float) -> float:
    """Of one call, after two to warm up; `step` returns when its work is done."""
    step(), step()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


# -- this library -----------------------------------------------------------------------------------------------------


def our_steps(config: Config, rule_name: str, task_name: str) -> list[Callable[[], Any]]:
    import jax
    import jax.numpy as jnp

    from ngjax.metatrain.tasks import Batch, find_task
    from ngjax.metatrain.unroll import take_step
    from ngjax.optimizers import init_meta_params, ng_learned_opt
    from ngjax.optimizers.named_rules import PAPER_RULES

    task, rule = find_task(task_name), PAPER_RULES[rule_name]
    # The data alone say how large the images are.
    shape = (28, 28, 1) if task_name.startswith("fashion") else (32, 32, 3)
    rng = np.random.default_rng(0)
    batch = Batch(
        jnp.asarray(rng.integers(0, 255, (BATCH_SIZE, *shape)), jnp.uint8),
        jnp.asarray(rng.integers(0, 10, BATCH_SIZE), jnp.int32),
    )
    params = jax.jit(task.init)(jax.random.key(0))
    theta = init_meta_params(jax.random.key(1), rule)

    def optimizer_of(theta: Any) -> Any:
        return ng_learned_opt(rule, spec=task.spec(), meta_params=theta, step="paper", chunk=config.chunk)

    value_and_grad = jax.value_and_grad(task.loss)
    state = optimizer_of(theta).init(params)

    @jax.jit
    def update(gradient: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer_of(theta).update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    gradient_of = jax.jit(value_and_grad)

    @jax.jit
    def meta_step(theta: Any, state: Any, params: Any) -> Any:
        _, gradient = value_and_grad(params, batch)
        params, state, pullback = take_step(optimizer_of, theta, gradient, state, params)
        loss, after = value_and_grad(params, batch)
        return loss, params, state, pullback(after)

    _, gradient = gradient_of(params, batch)
    return [
        lambda: jax.block_until_ready(update(gradient, state, params)),
        lambda: jax.block_until_ready(gradient_of(params, batch)),
        lambda: jax.block_until_ready(meta_step(theta, state, params)),
    ]


# -- the reference ----------------------------------------------------------------------------------------------------


def reference_steps(config: Config, rule: str, task: str) -> list[Callable[[], Any]]:
    assert config.reference is not None
    root = config.reference.resolve()
    if not (root / "src" / "l2o").is_dir():
        raise FileNotFoundError(f"{root}: expected a checkout of lsbicego/learning-gnns, there is no src/l2o")
    sys.path.insert(0, str(root))
    for module, name in NOT_NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError:
            sys.modules[module] = types.ModuleType(module)
            setattr(sys.modules[module], name, None)
    import torch
    from src.l2o.l2o_train import MetaOpt
    from src.l2o.l2o_utils import set_model_params

    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    channels = [3 if task.startswith("cifar") else 1, *map(int, task.split("-")[2:])]
    side = 32 if task.startswith("cifar") else 28
    layers: list[Any] = []
    for i, (before, after) in enumerate(itertools.pairwise(channels)):
        layers += [torch.nn.Conv2d(before, after, 3, 2 if i == 0 else 1, 0 if i == 0 else 1), torch.nn.ReLU()]
    net = torch.nn.Sequential(
        *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(channels[-1], 10)
    )
    images, labels = torch.randn(BATCH_SIZE, channels[0], side, side), torch.arange(BATCH_SIZE) % 10
    features, num_layers = SIZES[rule]
    optimizer = MetaOpt(
        hid=[features] * num_layers,
        momentum=5,
        layers=num_layers,
        heads=4,
        gnn="pna_noscale" if rule == "ng-gnn" else "rt_noscale",
        layer_layout=[*channels, 10],
        wave_pos_embed=True,
    )
    start = [p.detach().clone() for p in net.parameters()]
    size = sum(p.numel() for p in start)
    zero_update = torch.zeros(size)

    def gradient() -> None:
        # New leaves, as after each of its updates; what the code does between two steps.
        set_model_params(net, zero_update, keep_grad=False)
        torch.nn.functional.cross_entropy(net(images), labels).backward()

    def update() -> None:
        with torch.no_grad():
            new, _, _ = optimizer(net, momentum=torch.zeros(size, 5))
            torch.cat([p.flatten() for p in net.parameters()]).add_(new)

    def meta_step() -> None:
        optimizer.zero_grad()
        gradient()
        new, _, _ = optimizer(net, momentum=torch.zeros(size, 5))
        set_model_params(net, new, keep_grad=True)
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        for p in net.parameters():
            p.detach_()

    gradient()
    # Gradients have to be there for the update, so this comes first in each.
    return [update, gradient, meta_step]


# -- the table --------------------------------------------------------------------------------------------------------


def format_table(rows: list[dict[str, Any]]) -> str:
    """The results as a table in Markdown, and how many times as long as this library each side takes."""
    columns = (*MEASURES, "meta-step less gradients")
    lines = [
        f"| rule | network | side | {' | '.join(f'{name}, ms' for name in columns)} |",
        f"| --- | --- | --- | {' | '.join(['---:'] * len(columns))} |",
    ]
    ours = {(row["rule"], row["task"]): row for row in rows if row["side"] == "ngjax"}
    for row in rows:
        like = ours[row["rule"], row["task"]]
        cells = [
            f"{row[name]:.1f}" + ("" if row is like else f" ({row[name] / like[name]:.1f} times)") for name in columns
        ]
        lines.append(f"| {row['rule']} | {row['task']} | {row['side']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Config))
