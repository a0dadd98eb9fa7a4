"""What does a training step of NG-GNN and of NG-T cost per network, against the authors' PyTorch code?

One step is forward, backward and optimizer (AdamW with AMSGrad), for classifying SIRENs 2-32-32-1 with the models of
Kofinas et al. 2024, section 4.1: NG-GNN with 32 features, 4 layers and reverse edges; NG-T with 64 features of nodes,
32 of pairs, attention over 128 in 8 heads and 4 layers. Each side runs in a process of its own with the same number of
threads and at the best of several batch sizes; the sides are

    blocks       this library with the spec: products block by block, in micro-batches on CPU
    edge list    this library without it: segment operations over a padded batch of graphs
    PyTorch      the reference, from a checkout of github.com/mkofinas/neural-graphs, where one is given

    python benchmarks/train_step.py --reference neural-graphs --out train_step.json

The reference needs torch, torch_geometric 2.3.1, hydra-core, einops, random-fourier-features-pytorch and
opencv-python-headless. Prints a table: milliseconds per network and step, peak memory of the process, and the share of
the peak rate of the machine, as reached by a large matrix product in the same process. Compare the rows of one run with
each other, not with other machines.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import functools
import json
import multiprocessing
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tyro

from ngjax.files import write_atomically
from ngjax.machine import available_cores, processor_name

SIZES = (2, 32, 32, 1)
MODELS = ("ng-gnn", "ng-t")
SIDES = ("blocks", "edge list", "PyTorch")


@dataclasses.dataclass(frozen=True)
class Config:
    """One comparison."""

    reference: pathlib.Path | None = None
    """Checkout of the authors' code; without it only the sides of this library are run."""
    models: tuple[str, ...] = MODELS
    threads: int = 2
    """Of every side; on CPU this library takes as many devices."""
    frequencies: int = 0
    """Of the random Fourier features of weights, on all sides: 0 for none, 128 in the paper."""
    batch_sizes: tuple[int, ...] = (32, 128)
    """Networks per step that are tried."""
    micro_batches: tuple[int, ...] = (1, 2, 4)
    """Of the block path on CPU."""
    seconds: float = 6.0
    """That each batch size is repeated for, at least three times."""
    out: pathlib.Path | None = None
    """File for the results."""


def main(config: Config) -> None:
    rows = []
    for model in config.models:
        for side in SIDES:
            if side == "PyTorch" and config.reference is None:
                continue
            # A process for each, so that threads and peak memory are its own.
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                row = pool.submit(measure, config, model, side).result()
            rows.append({"model": model, "side": side, **row})
            print(f"{model}, {side}: {row['milliseconds']:.2f} ms per network and step", file=sys.stderr, flush=True)
    table = format_table(rows)
    print(table)
    if config.out is not None:
        results = {
            "rows": rows,
            "config": {**dataclasses.asdict(config), "reference": config.reference is not None, "out": None},
            "machine": {"processor": processor_name(), "cores": available_cores(), "system": platform.platform()},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "table": table.splitlines(),
        }
        with write_atomically(config.out) as path:
            path.write_text(json.dumps(results, indent=2) + "\n")


def measure(config: Config, model: str, side: str) -> dict[str, Any]:
    """The best of all batch sizes, in this process."""
    sides = {"blocks": block_steps, "edge list": edge_list_steps, "PyTorch": reference_steps}
    best: dict[str, Any] = {}
    tried = {}
    for name, batch_size, step in sides[side](config, model):
        seconds = best_time(step, config.seconds) / batch_size
        tried[name] = round(1e3 * seconds, 3)
        if not best or 1e3 * seconds < best["milliseconds"]:
            best = {"milliseconds": 1e3 * seconds, "at": name}
    # Before the large product, which takes memory itself.
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    gflops, rate = flops(config, model) / 1e9, peak_rate(side == "PyTorch")
    return {
        **best,
        "tried": tried,
        "peak_memory_gigabytes": peak_memory,
        "gigaflop_per_network": gflops,
        "machine_gigaflop_per_second": rate,
        "share_of_peak": gflops / (best["milliseconds"] / 1e3) / rate,
    }


def best_time(step: Callable[[], Any], seconds: float) -> float:
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


def build(config: Config, model: str) -> Any:
    import ngjax

    encoder = ngjax.EncoderConfig(reverse_edges=model == "ng-gnn", fourier_frequencies=config.frequencies)
    if model == "ng-gnn":
        backbone: Any = ngjax.NGGNN(features=32, num_layers=4, encoder=encoder)
        return ngjax.WeightSpaceModel(backbone, ngjax.GraphReadout(10, hidden=32, num_outputs=1))
    # Few rows of attention at a time stay in cache; an accelerator takes them all.
    rows = 4 if on_cpu() else None
    backbone = ngjax.NGT(num_layers=4, encoder=encoder, last_edge_update=False, attention_rows=rows)
    return ngjax.WeightSpaceModel(backbone, ngjax.GraphReadout(10, hidden=128, num_hidden=1, num_outputs=1))


def on_cpu() -> bool:
    import jax

    return jax.devices()[0].platform == "cpu"


def networks(count: int) -> Any:
    import jax

    from ngjax.zoo import init_siren

    keys = jax.random.split(jax.random.key(0), count)
    return jax.tree.map(np.asarray, jax.vmap(lambda key: init_siren(key, SIZES))(keys))


def loss_of(logits: Any, labels: Any) -> Any:
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), {}


def repeated_step(loss_fn: Any, variables: Any, batch: Any, micro_batch: int | None, devices: int) -> Callable:
    """A function that takes one training step after another."""
    import jax

    from ngjax import train

    mesh = train.data_mesh(jax.devices()[:devices])
    optimizer = train.make_optimizer(1e-4)
    constants = {name: value for name, value in variables.items() if name != "params"}
    step_fn = jax.jit(
        functools.partial(
            train.train_step,
            loss_fn=functools.partial(loss_fn, constants),
            optimizer=optimizer,
            mesh=mesh,
            micro_batch=micro_batch,
        ),
        donate_argnums=0,
    )
    state = train.replicate(train.init_state(variables["params"], optimizer), mesh)
    key = train.replicate(jax.random.key(1), mesh)

    def step() -> None:
        nonlocal state
        state, metrics = step_fn(state, batch(mesh), key)
        jax.block_until_ready((state, metrics))

    return step


def block_steps(config: Config, model: str) -> Any:
    from ngjax import train

    train.use_cpu_cores(config.threads)
    import jax

    import ngjax

    spec = ngjax.mlp_spec(SIZES, activation="siren")
    module = build(config, model)
    micro_batches = config.micro_batches if on_cpu() else (None,)
    devices = config.threads if on_cpu() else 1
    init = jax.jit(lambda key, params: module.init(key, ngjax.to_groups(spec, params), spec=spec))
    variables = init(jax.random.key(1), networks(1))

    def loss_fn(constants: Any, params: Any, batch: Any, key: Any) -> Any:
        graph = ngjax.to_groups(spec, batch[0])
        return loss_of(module.apply({"params": params, **constants}, graph, spec=spec, train=True), batch[1])

    for size in config.batch_sizes:
        rows = (networks(size), np.arange(size) % 10)
        for micro_batch in micro_batches:
            name = f"batch {size}" + (f", {micro_batch} at a time" if micro_batch else "")
            batch = functools.partial(train.shard_batch, rows)
            yield name, size, repeated_step(loss_fn, variables, batch, micro_batch, devices)


def edge_list_steps(config: Config, model: str) -> Any:
    import jax

    import ngjax
    from ngjax import train

    spec = ngjax.mlp_spec(SIZES, activation="siren")
    module = build(config, model)

    def padded(size: int) -> Any:
        stacked = networks(size)
        graphs = [ngjax.to_graph(spec, jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in range(size)]
        budget = ngjax.GraphBudget(size, size * spec.num_nodes, size * spec.num_edges, spec.num_nodes)
        return ngjax.batch_graphs(graphs, budget)

    variables = jax.jit(module.init)(jax.random.key(1), padded(1))

    def loss_fn(constants: Any, params: Any, batch: Any, key: Any) -> Any:
        return loss_of(module.apply({"params": params, **constants}, batch[0], train=True), batch[1])

    # All pairs of many graphs at once need too much memory.
    for size in (size for size in config.batch_sizes if model == "ng-gnn" or size <= 32):
        graphs = jax.tree.map(np.asarray, padded(size))
        rows = (graphs, np.arange(size) % 10)
        batch = functools.partial(lambda rows, mesh: train.replicate(rows, mesh), rows)
        yield f"batch {size}", size, repeated_step(loss_fn, variables, batch, None, 1)


def flops(config: Config, model: str) -> float:
    """Floating-point operations of forward and backward for one network, as written and before any is recomputed."""
    import jax

    import ngjax

    spec = ngjax.mlp_spec(SIZES, activation="siren")
    module = build(config, model)
    if model == "ng-t":
        module = module.clone(backbone=module.backbone.clone(attention_rows=None))
    params = jax.tree.map(lambda leaf: leaf[0], networks(1))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(1), ngjax.to_groups(spec, params), spec=spec))

    def loss(variables: Any) -> Any:
        return module.apply(variables, ngjax.to_groups(spec, params), spec=spec).sum()

    cost = jax.jit(jax.grad(loss)).lower(variables).cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost)["flops"])


# -- the reference ----------------------------------------------------------------------------------------------------


def reference_steps(config: Config, model: str) -> Any:
    """Its own configuration files, with the settings of this comparison."""
    assert config.reference is not None
    root = config.reference.resolve()
    configs = root / "experiments" / "inr_classification" / "configs"
    if not configs.is_dir():
        raise FileNotFoundError(f"{root}: expected a checkout of mkofinas/neural-graphs, there is no {configs}")
    sys.path.insert(0, str(root))
    import hydra
    import torch

    torch.set_num_threads(config.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with hydra.initialize_config_dir(version_base=None, config_dir=str(configs)):
        settings = hydra.compose(
            config_name="base",
            overrides=[
                f"model={'pna' if model == 'ng-gnn' else 'rtransformer'}",
                f"model.rev_edge_features={model == 'ng-gnn'}",
                f"model.graph_constructor.inp_factor={3 if model == 'ng-gnn' else 1}",
                f"model.graph_constructor.sin_emb={config.frequencies > 0}",
                f"model.graph_constructor.sin_emb_dim={max(config.frequencies, 1)}",
            ],
        )
        settings.data.stats = None
        module = hydra.utils.instantiate(settings.model, layer_layout=SIZES).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=5e-4, amsgrad=True)
    for size in config.batch_sizes:
        params = networks(size).values()
        weights = tuple(torch.tensor(layer["kernel"])[..., None].to(device) for layer in params)
        biases = tuple(torch.tensor(layer["bias"])[..., None].to(device) for layer in params)
        labels = (torch.arange(size) % 10).to(device)

        def step(weights: Any = weights, biases: Any = biases, labels: Any = labels) -> None:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(module((weights, biases)), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)
            optimizer.step()
            loss.item()

        yield f"batch {size}", size, step


# -- the machine, the table -------------------------------------------------------------------------------------------


def peak_rate(in_torch: bool, size: int = 3072) -> float:
    """Gigaflops per second of a large product of matrices in float32, with the threads of this process."""
    if in_torch:
        import torch

        a = torch.ones(size, size, device="cuda" if torch.cuda.is_available() else "cpu")
        seconds = best_time(lambda: float((a @ a)[0, 0]), 2.0)
    else:
        import jax
        import jax.numpy as jnp

        ones = jnp.ones((size, size))
        product = jax.jit(jnp.matmul)
        seconds = best_time(lambda: jax.block_until_ready(product(ones, ones)), 2.0)
    return 2 * size**3 / seconds / 1e9


def format_table(rows: list[dict[str, Any]]) -> str:
    """The results as a table in Markdown, ratios against the block path of the same model."""
    lines = [
        "| model | side | ms per network and step | times the block path | at | peak memory | share of the peak rate |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: |",
    ]
    fastest = {row["model"]: row["milliseconds"] for row in rows if row["side"] == "blocks"}
    lines += [
        f"| {row['model']} | {row['side']} | {row['milliseconds']:.2f} | "
        f"{row['milliseconds'] / fastest[row['model']]:.1f} | {row['at']} | {row['peak_memory_gigabytes']:.2f} GB | "
        f"{row['share_of_peak']:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Config))
