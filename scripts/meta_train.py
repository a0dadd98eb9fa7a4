"""Meta-trains a learned optimizer on a family of tasks.

    python scripts/meta_train.py --out runs/ff --rule ff --tasks digits-mlp-32-relu
    python scripts/meta_train.py --out runs/ff-pes --rule ff --tasks digits-mlp-32-relu --estimator pes

Killed, it goes on where it was when the same command is run again.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import shlex
import sys
import time
from typing import Any, Literal

import jax
import matplotlib as mpl
import optax
import tyro
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import ngjax
from ngjax import train
from ngjax.files import write_atomically
from ngjax.machine import describe_machine
from ngjax.metatrain.estimators import PES, Estimator, OneStep
from ngjax.metatrain.loop import meta_train
from ngjax.metatrain.meta_file import save_meta_params
from ngjax.metatrain.optimizers import LearnedOptimizer
from ngjax.metatrain.tasks import find_task, load_task_data
from ngjax.metatrain.unroll import RunSettings, Trainer
from ngjax.optimizers import init_meta_params
from ngjax.report import save_figure


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained, on what and how."""

    out: pathlib.Path
    """Folder of the run."""
    tasks: tuple[str, ...]
    """Names of the tasks; the outer steps take them in turn."""
    rule: str = "ff"
    """What the optimizer computes its updates with."""
    step: Literal["normalized", "paper"] = "normalized"
    """Form of its step."""
    estimator: Literal["one-step", "pes"] = "one-step"
    """Of meta-gradients: through single steps, or evolution strategies through whole runs."""
    outer_steps: int = 2000
    runs: int = 16
    """Optimizees of a task that are trained at once."""
    seed: int = 0
    truncation: int = 50
    """Inner steps of an outer step."""
    horizons: tuple[int, ...] = (50, 100, 200, 400)
    """Steps of a run."""
    peak_rates: tuple[float, float] = (1e-3, 1e-1)
    """Smallest and largest peak of the learning rate."""
    scale_spread: float = 10.0
    """Largest scale of the random reparametrizations; 1 for none."""
    deviation: float = 0.01
    """Of the perturbations of PES."""
    learning_rate: float = 1e-3
    """Of the outer AdamW: its peak, after the warm-up; then a cosine down to zero."""
    weight_decay: float = 0.0
    warmup_steps: int = 50
    """Outer steps."""
    clip_norm: float = 1.0
    """Largest norm of a meta-gradient."""
    data_dir: pathlib.Path | None = None
    """Folder with data sets, by default that of the environment variable NGJAX_DATA_DIR; else they are downloaded."""
    save_every_seconds: float = 300.0
    """Between checkpoints: what a kill costs at most."""


def main(config: Config) -> dict[str, Any]:
    """Trains, or what is missing of it; returns what results.json holds."""
    out = train.prepare_folder(config.out, "resume")
    tasks = [find_task(name) for name in config.tasks]
    data = {name: load_task_data(name, data_dir=config.data_dir) for name in {task.data for task in tasks}}
    settings = RunSettings(config.horizons, config.peak_rates, scale_spread=config.scale_spread)
    trainers = [Trainer(task, LearnedOptimizer(config.rule, config.step), settings) for task in tasks]
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    start = time.perf_counter()
    result = meta_train(
        trainers,
        data,
        init_meta_params(init_key, config.rule),
        estimator=make_estimator(config),
        optimizer=make_outer_optimizer(config),
        num_steps=config.outer_steps,
        runs=config.runs,
        key=run_key,
        directory=out,
        if_exists="resume",
        save_every_seconds=config.save_every_seconds,
    )
    seconds = time.perf_counter() - start
    results = {
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "seconds": round(seconds, 1),
        "machine": describe_machine(),
        "versions": {"ngjax": ngjax.__version__, "jax": jax.__version__},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    save_meta_params(out / "meta_params.safetensors", result.theta, {**results, "command": shlex.join(sys.argv)})
    with write_atomically(out / "results.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n")
    save_figure(draw_curves(config, result.history), out / "curves.png")
    return results


def make_estimator(config: Config) -> Estimator:
    if config.estimator == "pes":
        return PES(config.truncation, config.deviation)
    return OneStep(config.truncation)


def make_outer_optimizer(config: Config) -> optax.GradientTransformation:
    return train.make_optimizer(
        config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=min(config.warmup_steps, config.outer_steps // 2),
        total_steps=config.outer_steps,
        clip_norm=config.clip_norm,
        amsgrad=False,
    )


def draw_curves(config: Config, history: list[train.metrics.Row]) -> Figure:
    """The meta-loss of every task against the outer steps."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for number, name in enumerate(config.tasks):
        rows = [row for row in history if row["task"] == number]
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], f"C{number % 10}", label=name)
    axis.set(xlabel="outer step", ylabel="meta-loss")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


if __name__ == "__main__":
    mpl.use("agg")
    train.use_cpu_cores()
    main(tyro.cli(Config, description=__doc__))
