"""Meta-trains a learned optimizer on a family of tasks, and compares it with Adam.

    python scripts/meta_train.py --out runs/ff --rule ff --tasks digits-mlp-32-relu digits-mlp-24-24-tanh
    python scripts/meta_train.py --out runs/ff-pes --rule ff --tasks digits-mlp-32-relu --estimator pes
    python scripts/meta_train.py --out runs/ff-paper --rule ff --tasks fashion-cnn-16-32-32 --scheme paper

The scheme `fresh` takes losses on fresh batches, in runs of many lengths, peak learning rates and reparametrizations;
by default a step is credited with all losses after it until the next outer step. The scheme `paper` is that of Kofinas
et al. 2024 (arXiv 2403.12143). Killed, a run goes on where it was when the same command is given again. A finished one
goes on with more `--outer-steps`: the outer learning rate, which had come down to zero, rises to where a schedule of
that length has it.

Writes into the output folder: `meta_params.safetensors` with `card.md`, `results.json`, `curves.png`, and
`metrics.jsonl` and all that resuming needs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import matplotlib as mpl
import numpy as np
import optax
import tyro
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ngjax import train
from ngjax.files import write_atomically, write_json
from ngjax.machine import available_cores, describe_process
from ngjax.metatrain.comparison import Candidate, RunResult, best_rate, hand_made, make_trainer, run_once, tuning_loss
from ngjax.metatrain.estimators import PES, Estimator, OneStep, PaperScheme
from ngjax.metatrain.loop import meta_train, paper_optimizer
from ngjax.metatrain.optimizers import LearnedOptimizer
from ngjax.metatrain.tasks import find_task, load_task_data
from ngjax.metatrain.unroll import RunSettings, Trainer
from ngjax.optimizers import init_meta_params
from ngjax.optimizers.meta_file import check_made_for, load_meta_params, save_meta_params
from ngjax.optimizers.named_rules import find_rule
from ngjax.report import deviation_of, markdown_table, save_figure, with_deviation

MAY_CHANGE = ("out", "data_dir", "save_every_seconds", "chunk", "test_steps", "test_seeds", "distributed")
"""What may differ when a run is taken up again."""

SETTINGS, LENGTHENED = "settings.json", "lengthened"

ADAM_RATES = (3e-4, 1e-1)
"""Between these Adam's best learning rate is looked for."""

TABLE_NOTES = """\
Of fresh networks, trained with each of several peak learning rates: the one whose training loss ends lowest in the mean
  over the seeds. Losses and accuracies are those of test examples."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained, on what and how. The scheme `paper` knows no settings but those that say so."""

    out: pathlib.Path
    """Folder of the run. Any scheme."""
    tasks: tuple[str, ...]
    """Names of the tasks, see `find_task`; the outer steps take them in turn. Any scheme."""
    rule: Literal["ff", "lstm", "ng-gnn", "ng-t", "nfn", "celo2", "coordinatewise-lstm"] = "ff"
    """What the optimizer computes its updates with, in the sizes of `PAPER_RULES` for steps of the paper's form, else
    of `RULES`. Any scheme."""
    scheme: Literal["fresh", "paper"] = "fresh"
    """How the loss of the meta-parameters is made up."""
    step: Literal["normalized", "paper"] | None = None
    """Form of the step. By default normalized, and the paper's in the paper's scheme, which knows no other. The paper's
    learns its magnitude: of the learning rate of a run it sees nothing."""
    estimator: Literal["one-step", "pes"] = "one-step"
    """Of meta-gradients: through single steps, each credited with the losses after it, or evolution strategies through
    whole runs."""
    outer_steps: int | None = None
    """Updates of the meta-parameters; by default 2000, and 1000 in the paper's scheme. Any scheme."""
    runs: int | None = None
    """Optimizees of a task that are trained at once; by default 16, and 1 in the paper's scheme. Any scheme."""
    seed: int = 0
    """Of all randomness. Any scheme."""
    truncation: int | None = None
    """Inner steps of an outer step; by default 50, and 100 in the paper's scheme. Any scheme."""
    horizons: tuple[int, ...] = (50, 100, 200, 400)
    """Steps of a run, each as likely."""
    peak_rates: tuple[float, float] = (1e-3, 1e-1)
    """Smallest and largest peak of the inner learning rate."""
    scale_spread: float = 10.0
    """Largest scale of the random reparametrizations; 1 for none."""
    credit_decay: float = 1.0
    """One-step: of what a step is credited with, for each step until the loss; with 0, only the loss right after it
    counts, and what is learned is greedy."""
    equal_runs: bool = True
    """Give the one-step gradient of each run a norm of one; otherwise runs with large learning rates decide."""
    deviation: float = 0.01
    """Of the perturbations of PES."""
    learning_rate: float | None = None
    """Of the outer optimizer: its peak, then a cosine down to zero; by default 1e-3, after a warm-up, and 3e-4 in the
    paper's scheme. Any scheme."""
    weight_decay: float = 0.0
    warmup_steps: int = 50
    """Outer steps."""
    clip_norm: float = 1.0
    """Largest norm of a meta-gradient."""
    chunk: int | None = None
    """Scalars that the rule's perceptron sees at a time: less memory, and on CPU faster on networks with thousands of
    parameters, as the paper's: 1024. Any scheme."""
    test_steps: int = 200
    """Steps of the networks for the table at the end; 0 for none. Any scheme."""
    test_seeds: int = 3
    """Networks for each number of the table. Any scheme."""
    start_from: pathlib.Path | None = None
    """File with meta-parameters of the same rule and step to begin with, instead of fresh ones. Any scheme."""
    data_dir: pathlib.Path | None = None
    """Folder with data sets, by default that of the environment variable NGJAX_DATA_DIR; else they are downloaded."""
    save_every_seconds: float = 300.0
    """Between checkpoints: what a kill costs at most."""
    distributed: bool = False
    """Join the other processes of a job on several hosts, each of which runs this same command."""


DEFAULTS = {
    "fresh": {"step": "normalized", "outer_steps": 2000, "runs": 16, "truncation": 50, "learning_rate": 1e-3},
    "paper": {"step": "paper", "outer_steps": 1000, "runs": 1, "truncation": 100, "learning_rate": 3e-4},
}
"""Of settings that differ between the schemes."""


def with_defaults(config: Config) -> Config:
    """The settings with those of the scheme where they are not given."""
    missing = {name: value for name, value in DEFAULTS[config.scheme].items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def main(config: Config) -> dict[str, Any]:
    """Trains, or what is missing of it; returns what results.json holds."""
    config = with_defaults(config)
    if config.scheme == "paper" and config.estimator == "pes":
        raise ValueError("scheme=paper has its own estimator, expected estimator=one-step")
    if config.scheme == "paper" and config.step != "paper":
        raise ValueError(f"scheme=paper is for steps of its own form, expected step=paper, received step={config.step}")
    tasks = [find_task(name) for name in config.tasks]  # before any work: an unknown name fails here
    before = None if config.start_from is None else load_meta_params(config.start_from)
    if before is not None:
        check_made_for(before, config.rule, config.step, str(config.start_from))
    out = train.prepare_folder(config.out, "resume")
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    fixed = {k: v for k, v in settings.items() if k not in MAY_CHANGE}
    lengthened = check_settings(out, fixed)
    standing = finished_results(out, config)
    if standing is not None:
        say(f"{out} holds this run, finished\n\n" + "\n".join(standing["table"]))
        return standing
    data = {name: load_task_data(name, data_dir=config.data_dir) for name in sorted({task.data for task in tasks})}
    if jax.process_index() == 0:
        write_json(out / SETTINGS, {**fixed, LENGTHENED: lengthened})
    run_settings = RunSettings(config.horizons, config.peak_rates, scale_spread=config.scale_spread)
    rule = find_rule(config.rule, config.step)
    maker = LearnedOptimizer(rule, config.step, config.chunk)
    trainers = [Trainer(task, maker, run_settings) for task in tasks]
    init_key, run_key = jax.random.split(jax.random.key(config.seed), 3)[:2]  # of three, as in earlier runs
    theta = init_meta_params(init_key, rule, config.step) if before is None else before.theta
    say(
        f"{config.rule}, {config.step} steps, scheme {config.scheme}, {config.outer_steps:,} outer steps on "
        f"{', '.join(config.tasks)}"
    )
    start = time.perf_counter()
    result = meta_train(
        trainers,
        data,
        theta,
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
    theta = jax.device_get(result.theta)
    provenance = {
        "rule": config.rule,
        "step": config.step,
        "seed": config.seed,
        "config": {k: v for k, v in settings.items() if k not in ("out", "data_dir", "start_from")},
        "started_from": None if before is None else before.metadata,
        "lengthened": lengthened,
        "seconds": round(seconds, 1),  # of this start of the script
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        **describe_process(),
    }
    if jax.process_index() == 0:
        save_meta_params(out / "meta_params.safetensors", theta, provenance)
        save_figure(draw_curves(config, result.history), out / "curves.png")
    table = compare(config, trainers, data, theta) if config.test_steps else {}
    lines = format_table(config, table).splitlines() if table else []
    results = {**provenance, "table": lines, "tests": table, "meta_loss": last_losses(config, result.history)}
    if jax.process_index() == 0:
        with write_atomically(out / "card.md") as unfinished:
            unfinished.write_text(format_card(results), encoding="utf-8")
        write_json(out / "results.json", results)  # the last of all, as it says that the run is finished
    say("\n" + "\n".join(lines) + f"\n\n{TABLE_NOTES}\n" if lines else "")
    say(f"meta-parameters, numbers and picture are in {out}")
    return results


def check_settings(out: pathlib.Path, settings: dict[str, Any]) -> list[int]:
    """Raises if the folder holds a run with other settings, as a run goes on only with its own.

    But a finished one may be lengthened. Returns the outer steps that it had been finished with, each time before.
    """
    path = out / SETTINGS
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    lengthened: list[int] = found.get(LENGTHENED, [])
    for name in settings:
        if found.get(name) == settings[name]:
            continue
        if name == "outer_steps" and settings[name] > found[name]:
            if not is_finished(out, found[name]):
                raise ValueError(f"{out} holds a run that is not finished: give its outer_steps={found[name]} first")
            lengthened = [*lengthened, found[name]]
            continue
        raise ValueError(
            f"{out} holds a run with {name}={found.get(name)}, received {settings[name]}: choose another folder, or "
            "the settings of the run to continue it"
        )
    return lengthened


def is_finished(out: pathlib.Path, outer_steps: int) -> bool:
    """Whether the folder holds the results of so many outer steps."""
    results = read_results(out)
    return results is not None and results["config"]["outer_steps"] == outer_steps


def finished_results(out: pathlib.Path, config: Config) -> dict[str, Any] | None:
    """What results.json holds, if that is what this command would write there."""
    results = read_results(out)
    names = ("outer_steps", "test_steps", "test_seeds") if config.test_steps else ("outer_steps",)
    is_same = results is not None and all(results["config"][name] == getattr(config, name) for name in names)
    return results if is_same else None


def read_results(out: pathlib.Path) -> dict[str, Any] | None:
    path = out / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def make_estimator(config: Config) -> Estimator:
    if config.scheme == "paper":
        return PaperScheme(config.truncation)
    if config.estimator == "pes":
        return PES(config.truncation, config.deviation)
    return OneStep(config.truncation, config.credit_decay, config.equal_runs)


def make_outer_optimizer(config: Config) -> optax.GradientTransformation:
    if config.scheme == "paper":
        return paper_optimizer(config.outer_steps, config.learning_rate)
    return train.make_optimizer(
        config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=min(config.warmup_steps, config.outer_steps // 2),
        total_steps=config.outer_steps,
        clip_norm=config.clip_norm,
        amsgrad=False,
    )


# -- what is reported -------------------------------------------------------------------------------------------------


def compare(config: Config, trainers: Sequence[Trainer], data: dict[str, Any], theta: Any) -> dict[str, dict[str, Any]]:
    """The learned optimizer and Adam on fresh networks of every task, each with its best peak learning rate."""
    table: dict[str, dict[str, Any]] = {}
    for number, trainer in enumerate(trainers):
        task = trainer.task
        table[task.name] = {}
        has_rate = config.step == "normalized"
        for candidate, rates in (
            (Candidate(config.rule, trainer.make_optimizer, theta, has_rate), np.geomspace(*config.peak_rates, 5)),
            (hand_made("adam"), np.geomspace(*ADAM_RATES, 6)),
        ):
            begin = time.perf_counter()
            of_task = make_trainer(candidate, task, "cosine", config.test_steps)
            runs = {
                rate: [
                    run_once(of_task, candidate.theta, data[task.data], peak_rate=rate, seed=seed)
                    for seed in range(config.test_seeds)
                ]
                for rate in (rates.tolist() if candidate.has_rate else [1.0])  # without a rate any number does
            }
            table[task.name][candidate.name] = numbers_of(runs)
            seconds, left = time.perf_counter() - begin, len(trainers) - number - 1
            say(f"{task.name}: tested {candidate.name} in {seconds:.0f} s, {left} tasks more")
    return table


def numbers_of(runs: Mapping[float, Sequence[RunResult]]) -> dict[str, Any]:
    """Of the best peak rate; and of all, so that one can see how much it matters."""
    best = best_rate({rate: tuning_loss(of_rate) for rate, of_rate in runs.items()})

    losses = {rate: [run.test_loss for run in of_rate] for rate, of_rate in runs.items()}
    accuracies = [run.test_accuracy for run in runs[best]]
    return {
        "peak_rate": best,
        "test_loss": float(np.mean(losses[best])),
        "test_loss_deviation": deviation_of(losses[best]),
        "test_accuracy": float(np.mean(accuracies)),
        "test_accuracy_deviation": deviation_of(accuracies),
        "peak_rates": list(losses),
        "test_losses": np.nan_to_num([np.mean(of_rate) for of_rate in losses.values()], nan=np.inf)
        .clip(max=1e30)
        .tolist(),
    }


def last_losses(config: Config, history: list[train.metrics.Row]) -> dict[str, float]:
    """The mean meta-loss of the last tenth of the outer steps of every task."""
    means = {}
    for number, name in enumerate(config.tasks):
        losses = [row["loss"] for row in history if row["task"] == number]
        if losses:
            means[name] = float(np.mean(losses[-max(1, len(losses) // 10) :]))
    return means


def format_table(config: Config, table: dict[str, dict[str, Any]]) -> str:
    """The results as a table in Markdown."""

    def cell(numbers: dict[str, Any], name: str, style: str) -> str:
        return with_deviation(numbers[name], numbers[f"{name}_deviation"], style)

    header = (f"after {config.test_steps:,} steps", "optimizer", "peak rate", "test loss", "test accuracy")
    rows = [
        (
            task,
            title,
            "" if config.step == "paper" and title == config.rule else f"{numbers['peak_rate']:.2g}",
            cell(numbers, "test_loss", ".4f"),
            cell(numbers, "test_accuracy", ".2%"),
        )
        for task, of_task in table.items()
        for title, numbers in of_task.items()
    ]
    return markdown_table(header, rows, titles=2)


def format_card(results: dict[str, Any]) -> str:
    """What a user of the meta-parameters wants to know of them, in Markdown."""
    config, machine, versions = (results[key] for key in ("config", "machine", "versions"))
    before = results["started_from"]
    is_credited = (config["scheme"], config["estimator"]) == ("fresh", "one-step")
    decay = f" with a credit decay of {config['credit_decay']:g}" if is_credited else ""
    steps = ", then ".join(f"{steps:,}" for steps in results["lengthened"])
    lengthened = f"; its schedule ended after {steps} outer steps before it was lengthened" if steps else ""
    facts = {
        "Tasks": ", ".join(config["tasks"]),
        "Scheme": f"{config['scheme']}, {config['estimator']}{decay}, {config['outer_steps']:,} outer steps with "
        f"{config['runs']} runs of {config['truncation']} inner steps each{lengthened}",
        "Started from": "fresh meta-parameters" if before is None else f"`{before['command']}` ({before['date']})",
        "Command": f"`{results['command']}`",
        "Seed": config["seed"],
        "Date": results["date"],
        "Machine": f"{machine['processor']}, {machine['cores']} cores, {machine['device']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    lines = [
        f"# Meta-parameters of {results['rule']}, {results['step']} steps",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    table = ["", *results["table"], "", TABLE_NOTES] if results["table"] else []
    return "\n".join([*lines, *table]) + "\n"


def draw_curves(config: Config, history: list[train.metrics.Row]) -> Figure:
    """The meta-loss of every task against the outer steps: pale as it is, and as a running mean."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for number, name in enumerate(config.tasks):
        rows = [row for row in history if row["task"] == number]
        steps, losses = (np.array([row[key] for row in rows], np.float64) for key in ("step", "loss"))
        width = max(1, len(rows) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axis.plot(steps, losses, color=f"C{number % 10}", alpha=0.25, linewidth=0.8)
        axis.plot(steps[width - 1 :], smooth, color=f"C{number % 10}", label=name)
    is_paper = config.scheme == "paper"
    axis.set(xlabel="outer step", ylabel="loss after each inner step" if is_paper else "logarithm of the loss")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    estimator = "" if is_paper else f", {config.estimator}"
    figure.suptitle(f"{config.rule}, {config.step} steps, scheme {config.scheme}{estimator}")
    return figure


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    mpl.use("agg")
    settings = with_defaults(tyro.cli(Config, description=__doc__))
    # As many devices as can share the runs.
    train.use_cpu_cores(math.gcd(settings.runs, available_cores()))
    train.join_processes(settings.distributed)
    main(settings)
