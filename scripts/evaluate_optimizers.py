"""Learned optimizers and optax's on the same networks, each with its learning rate tuned.

    python scripts/evaluate_optimizers.py --out runs/evaluation --tasks digits-mlp-32-relu fashion-cnn-16-32-32 \
        --optimizers adam adamw sgd --meta-params runs/ff/meta_params.safetensors

Every optimizer trains networks of every task with each peak learning rate of a grid, from two seeds; with the rate
whose final training loss is lowest it does so again from five others, and these runs are reported. At a seed all
optimizers meet the same network and the same batches. With `--schedule cosine` learning rates rise to their peak and
fall to zero along a cosine. With `--schedule constant` they stay, as in Kofinas et al. 2024 (arXiv 2403.12143). Learned
optimizers in the paper's form have no learning rate, and are neither tuned nor scheduled in either.

Along a cosine losses fall most at its end. How many steps an optimizer saves is seen from whole runs that are shorter:
`--short-steps 250 333 500` asks which of them, with the same peak rate, end where Adam ends after all steps.

Writes `results.json` and `curves.png` into the output folder, after every task, and every run with its curve into the
folder `runs` in it. Killed, the same command goes on after the last run; runs that another command shares are used
again too, if made with the same versions of this library, jax and Python, and times if on the same machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import matplotlib as mpl
import numpy as np
import tyro
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ngjax import train
from ngjax.files import write_json
from ngjax.machine import describe_machine, describe_process, describe_versions
from ngjax.metatrain.comparison import (
    ADAMW_DECAY,
    DIVERGED_ABOVE,
    LAST_STEPS,
    SGD_MOMENTUM,
    WINDOW,
    Candidate,
    RunResult,
    ScheduleName,
    UpdateCost,
    best_rate,
    final_loss,
    gradient_milliseconds,
    hand_made,
    has_diverged,
    learned,
    make_trainer,
    run_once,
    running_mean,
    step_reduction,
    steps_to_reach,
    tuning_loss,
    update_cost,
)
from ngjax.metatrain.tasks import Task, TaskData, find_task, load_task_data
from ngjax.report import deviation_of, markdown_table, save_figure, with_deviation
from ngjax.train.progress import as_time

BASELINE = "adam"

TABLE_NOTES = f"""\
peak rate: of the learning rate, the best of the grid on seeds that are not reported; * at an end of the grid.
test accuracy, test loss: on all test examples, mean and standard deviation over the seeds.
training loss: mean over the last {LAST_STEPS} steps.
steps: until the training loss (running mean over {WINDOW} steps, mean over the seeds) is where Adam's ends.
step reduction: Adam's steps divided by these.
shortest run: of whole runs, fewer steps along a schedule of their own, the shortest one tried that ends there too.
diverged: runs that end above {DIVERGED_ABOVE:g} times the loss of the fresh network.
update: the optimizer alone, median. gradient: loss and gradient of the network on one batch.
state: what the optimizer keeps. temporaries: what the compiled update needs beside arguments and results.
adamw has a weight decay of {ADAMW_DECAY:g}, sgd a momentum of {SGD_MOMENTUM:g}."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Who is compared, on what and how."""

    out: pathlib.Path
    """Folder for results, picture and runs."""
    tasks: tuple[str, ...]
    """Names of the tasks, see `find_task`."""
    optimizers: tuple[str, ...] = ("adam", "adamw", "sgd")
    """Of adam, adamw, sgd and muon; adam has to be there, as the others are measured against it."""
    meta_params: tuple[pathlib.Path, ...] = ()
    """Learned optimizers: files that scripts/meta_train.py has written, each named after its folder."""
    schedule: ScheduleName = "cosine"
    """Of the learning rates."""
    steps: int = 1000
    """Of each run."""
    short_steps: tuple[int, ...] = ()
    """Further runs of so many steps show how few of them are enough for what Adam reaches with all."""
    long_steps: int = 0
    """Further runs of so many steps show whether the learned optimizers diverge; 0 for none."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the runs that are reported."""
    tuning_seeds: tuple[int, ...] = (100, 101)
    """Of the runs that the learning rates are chosen by."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Peak learning rates of the optimizers made by hand; a single one is not tuned."""
    learned_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """The same for learned ones."""
    data_dir: pathlib.Path | None = None
    """Folder with data sets, by default that of the environment variable NGJAX_DATA_DIR; else they are downloaded."""


class Outcome(NamedTuple):
    """What came out for an optimizer on a task."""

    rate: float | None  # None for an optimizer that has none
    tuning: dict[float, float]  # tuning loss by rate
    runs: list[RunResult]  # by seed
    other_runs: dict[int, list[RunResult]]  # the same by their steps, shorter or longer
    cost: UpdateCost
    gradient_ms: float


def main(config: Config) -> dict[str, Any]:
    """Runs what is missing; returns what results.json holds."""
    check(config)
    tasks = [find_task(name) for name in config.tasks]
    candidates = [*map(hand_made, config.optimizers), *map(learned, config.meta_params)]
    if len({candidate.name for candidate in candidates}) < len(candidates):
        names = ", ".join(candidate.name for candidate in candidates)
        raise ValueError(f"two optimizers of the same name among {names}: rename a file or its folder")
    out = train.prepare_folder(config.out)
    folder = train.prepare_folder(out / "runs")
    data = {name: load_task_data(name, data_dir=config.data_dir) for name in sorted({task.data for task in tasks})}
    plans: dict[tuple[str, str], Plan] = {}
    for task, candidate in itertools.product(tasks, candidates):
        plans[task.name, candidate.name] = plan(config, folder, task, candidate, data[task.data])
        let_go_of_programs()
    programs = [(*names, steps) for names, of in plans.items() for steps in (config.steps, *of.other_steps)]
    work = Work(sum(of.seconds for of in plans.values()), programs)
    say(
        f"{len(tasks)} tasks, {len(candidates)} optimizers: about {as_time(work.left())} and what compiling takes, "
        "less what is there already"
    )
    outcomes: dict[str, dict[str, Outcome]] = {}
    for task in tasks:
        outcomes[task.name] = {}
        for of in candidates:
            outcomes[task.name][of.name] = compete(config, folder, work, plans[task.name, of.name], data[task.data])
            let_go_of_programs()
        results = summarize(config, candidates, outcomes)
        write_json(out / "results.json", results)
        save_figure(draw_curves(outcomes), out / "curves.png")
    say("\n" + "\n".join([*results["table"], "", *results["cost_table"]]) + f"\n\n{TABLE_NOTES}\n")
    say(f"numbers, curves and runs are in {out}")
    return results


def let_go_of_programs() -> None:
    """Of all compiled so far; what the optimizers of a task share compiles again, which takes about a second.

    Each holds hundreds of memory mappings, Linux allows a process 65,530, and LLVM ends it where it gets no more: ten
    optimizers on three tasks, in runs of five lengths, were too many.
    """
    jax.clear_caches()


def check(config: Config) -> None:
    if BASELINE not in config.optimizers:
        raise ValueError(f"optimizers={config.optimizers}: expected {BASELINE}, which others are measured by")
    for name in ("tasks", "seeds", "tuning_seeds", "rates", "learned_rates"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}={values}: expected at least one, and none twice")
    short = config.short_steps
    if any(not 0 < steps < config.steps for steps in short) or len(set(short)) < len(short):
        raise ValueError(f"short_steps={short}: expected fewer than steps={config.steps}, above 0, and none twice")
    if 0 < config.long_steps <= config.steps:
        raise ValueError(f"long_steps={config.long_steps}: expected more than steps={config.steps}, or 0 for none")
    both = sorted(set(config.seeds) & set(config.tuning_seeds))
    if both:
        raise ValueError(f"seeds {both} are in both seeds and tuning_seeds; rates are to be chosen by other seeds")
    if config.steps < 1 or config.long_steps < 0 or min(config.rates + config.learned_rates) <= 0:
        raise ValueError(
            f"steps={config.steps}, long_steps={config.long_steps}, rates={config.rates}, "
            f"learned_rates={config.learned_rates}: expected steps and rates above 0"
        )


# -- runs -------------------------------------------------------------------------------------------------------------


Program: TypeAlias = tuple[str, str, int]  # task, optimizer, steps: what is compiled once


class Plan(NamedTuple):
    """What is to be run of an optimizer on a task, and about how long that takes."""

    task: Task
    candidate: Candidate
    rates: tuple[float, ...]  # to choose from
    other_steps: tuple[int, ...]  # of further runs
    cost: UpdateCost
    gradient_ms: float
    seconds: float


def plan(config: Config, folder: pathlib.Path, task: Task, candidate: Candidate, data: TaskData) -> Plan:
    def cost() -> dict[str, Any]:
        trainer = make_trainer(candidate, task, config.schedule, config.steps)
        return update_cost(trainer, candidate.theta, data)._asdict()

    machine = {"machine": describe_machine()}
    gradient_ms = remembered(folder, of_task(task) | machine, lambda: gradient_milliseconds(task, data))
    update = UpdateCost(**remembered(folder, of_candidate(task, candidate, config.schedule) | machine, cost))
    rates: tuple[float, ...] = ()
    if candidate.has_rate:
        rates = config.learned_rates if candidate.is_learned else config.rates
    other_steps = config.short_steps
    if config.long_steps and candidate.is_learned:
        other_steps += (config.long_steps,)
    tuning_steps = len(rates) * len(config.tuning_seeds) * config.steps if len(rates) > 1 else 0
    num_steps = tuning_steps + len(config.seeds) * (config.steps + sum(other_steps))
    seconds = num_steps * (update.milliseconds + gradient_ms) / 1e3
    return Plan(task, candidate, rates, other_steps, update, gradient_ms, seconds)


def of_task(task: Task) -> dict[str, Any]:
    """What all that is remembered of a task depends on."""
    return {"task": task.name, "versions": describe_versions()}


def of_candidate(task: Task, candidate: Candidate, schedule: ScheduleName) -> dict[str, Any]:
    """What all that is remembered of an optimizer on a task depends on."""
    return of_task(task) | {"optimizer": candidate.name, "version": candidate.version, "schedule": schedule}


class Work:
    """How much there is left to do, and how long that will take.

    Args:
      seconds: of all runs by their steps, as estimated before.
      programs: names of those that have to be compiled.
    """

    def __init__(self, seconds: float, programs: Sequence[Program]) -> None:
        self._seconds, self._to_come = seconds, set(programs)
        self._compiled: dict[Program, float] = {}  # seconds
        self._planned = self._took = 0.0  # of the runs that were compiled before

    def done(self, program: Program, planned: float, took: float | None) -> None:
        """A run is there, which took some seconds just now, or was there already."""
        self._seconds -= planned
        self._to_come.discard(program)
        if took is None:
            return
        if program in self._compiled:
            self._planned += planned
            self._took += took
        else:
            self._compiled[program] = took - planned

    def left(self) -> float:
        """Seconds, by how well the estimates were met up to now."""
        factor = self._took / self._planned if self._planned else 1.0
        compiling = float(np.mean([*self._compiled.values()])) if self._compiled else 0.0
        return max(0.0, self._seconds * factor + len(self._to_come) * compiling)


def compete(config: Config, folder: pathlib.Path, work: Work, plan: Plan, data: TaskData) -> Outcome:
    """Tunes an optimizer on a task and runs it with the rate that was found."""
    task, candidate = plan.task, plan.candidate
    step_seconds = (plan.cost.milliseconds + plan.gradient_ms) / 1e3

    def run(rate: float | None, seed: int, num_steps: int) -> RunResult:
        trainer = make_trainer(candidate, task, config.schedule, num_steps)
        took: float | None = None

        def compute() -> dict[str, Any]:
            nonlocal took
            begin = time.perf_counter()
            # Without a rate any number does.
            result = run_once(trainer, candidate.theta, data, peak_rate=1.0 if rate is None else rate, seed=seed)
            took = time.perf_counter() - begin
            return without_nan(result._asdict() | {"train_losses": result.train_losses.tolist()})

        of_run = of_candidate(task, candidate, config.schedule) | {"steps": num_steps, "rate": rate, "seed": seed}
        result = with_nan(remembered(folder, of_run, compute))
        work.done((task.name, candidate.name, num_steps), num_steps * step_seconds, took)
        if took is not None:
            at = "" if rate is None else f" at {rate:.3g}"
            say(
                f"{task.name}: {candidate.name}{at}, seed {seed}, {num_steps:,} steps: training loss "
                f"{final_loss(result):.4g}, {took:.1f} s; about {as_time(work.left())} left"
            )
        return result

    rate, tuning = (plan.rates[0] if plan.rates else None), {}
    if len(plan.rates) > 1:
        for each in plan.rates:
            tuning[each] = tuning_loss([run(each, seed, config.steps) for seed in config.tuning_seeds])
        rate = best_rate(tuning)
    runs = [run(rate, seed, config.steps) for seed in config.seeds]
    other_runs = {steps: [run(rate, seed, steps) for seed in config.seeds] for steps in plan.other_steps}
    return Outcome(rate, tuning, runs, other_runs, plan.cost, plan.gradient_ms)


def remembered(folder: pathlib.Path, identity: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """What `compute` returned when it was last called for this; called now if it never was."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{digest}.json"
    if not path.exists():
        write_json(path, {"of": identity, "result": compute()})
    return json.loads(path.read_text(encoding="utf-8"))["result"]


def without_nan(value: Any) -> Any:
    """The same with `None` for all numbers that are not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_nan(record: Mapping[str, Any]) -> RunResult:
    """The run of a record, whose losses that were not finite are NaN."""
    result = RunResult(**{name: math.nan if value is None else value for name, value in record.items()})
    return result._replace(train_losses=np.array(result.train_losses, np.float32))  # None becomes NaN


# -- what is reported -------------------------------------------------------------------------------------------------


def mean_losses(runs: Sequence[RunResult]) -> np.ndarray:
    """After each step, over the runs."""
    return np.mean([run.train_losses for run in runs], axis=0, dtype=np.float64)


def numbers_of_runs(seeds: Sequence[int], runs: Sequence[RunResult]) -> dict[str, Any]:
    """Means and deviations, with Bessel's correction, and every run."""
    each = {
        "test_accuracy": [run.test_accuracy for run in runs],
        "test_loss": [run.test_loss for run in runs],
        "train_loss": [final_loss(run) for run in runs],
    }
    diverged = [has_diverged(run) for run in runs]
    numbers: dict[str, Any] = {"diverged": sum(diverged)}
    for name, values in each.items():
        numbers[name] = float(np.mean(values))
        numbers[f"{name}_deviation"] = deviation_of(values)
    columns = {"seed": seeds, "diverged": diverged, **each}
    numbers["seeds"] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return numbers


def shortest_run(outcome: Outcome, baseline: np.ndarray) -> int | None:
    """The fewest steps of whole runs that end at the baseline's final loss or below, in the mean over the seeds.

    Runs longer than the baseline's do not count.
    """
    target = running_mean(baseline)[-1]
    every = {len(baseline): outcome.runs} | {n: runs for n, runs in outcome.other_runs.items() if n < len(baseline)}
    enough = [steps for steps, runs in every.items() if running_mean(mean_losses(runs))[-1] <= target]
    return min(enough, default=None)


def numbers_of(config: Config, outcome: Outcome, baseline: Outcome) -> dict[str, Any]:
    """What results.json holds of an optimizer on a task."""
    losses, target = mean_losses(outcome.runs), mean_losses(baseline.runs)
    others = {
        steps: {"steps": steps, **numbers_of_runs(config.seeds, runs)} for steps, runs in outcome.other_runs.items()
    }
    return {
        "peak_rate": outcome.rate,
        "at_end_of_grid": outcome.rate in (min(outcome.tuning), max(outcome.tuning)) if outcome.tuning else None,
        "tuning": [{"peak_rate": rate, "train_loss": loss} for rate, loss in outcome.tuning.items()],
        **numbers_of_runs(config.seeds, outcome.runs),
        "steps_to_baseline": steps_to_reach(losses, float(running_mean(target)[-1])),
        "step_reduction": step_reduction(losses, target),
        "shortest_run": shortest_run(outcome, target),
        "short": [others[steps] for steps in config.short_steps],
        "long": others.get(config.long_steps),
        "update_ms": outcome.cost.milliseconds,
        "gradient_ms": outcome.gradient_ms,
        "state_bytes": outcome.cost.state_bytes,
        "temporary_bytes": outcome.cost.temporary_bytes,
    }


def summarize(
    config: Config, candidates: Sequence[Candidate], outcomes: Mapping[str, Mapping[str, Outcome]]
) -> dict[str, Any]:
    """What results.json holds after these tasks."""
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    numbers = {
        task: {name: numbers_of(config, outcome, of_task[BASELINE]) for name, outcome in of_task.items()}
        for task, of_task in outcomes.items()
    }
    return without_nan(
        {
            "tasks": numbers,
            "versions_of_meta_params": {of.name: of.version for of in candidates if of.is_learned},
            **describe_process(),
            "config": {name: value for name, value in settings.items() if name not in ("out", "data_dir")},
            "table": format_table(config, numbers).splitlines(),
            "cost_table": format_costs(numbers).splitlines(),
        }
    )


def format_table(config: Config, numbers: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """How well the optimizers train, as a table in Markdown."""

    def cell(of: Mapping[str, Any], name: str, style: str) -> str:
        return with_deviation(of[name], of[f"{name}_deviation"], style)

    def row(task: str, title: str, of: Mapping[str, Any]) -> list[str]:
        rate = "none" if of["peak_rate"] is None else f"{of['peak_rate']:.3g}{'*' if of['at_end_of_grid'] else ''}"
        steps, factor = of["steps_to_baseline"], of["step_reduction"]
        cells = [
            task,
            title,
            rate,
            cell(of, "test_accuracy", ".2%"),
            cell(of, "test_loss", ".4f"),
            cell(of, "train_loss", ".4f"),
            "not reached" if steps is None else f"{steps:,}",
            "not reached" if factor is None else f"{factor:.2f}",
        ]
        if config.short_steps:
            cells.append("longer" if of["shortest_run"] is None else f"{of['shortest_run']:,}")
        cells.append(f"{of['diverged']} of {len(of['seeds'])}")
        if config.long_steps:
            long = of["long"]
            cells.append("" if long is None else f"{long['diverged']} of {len(long['seeds'])}")
        return cells

    header = [f"after {config.steps:,} steps", "optimizer", "peak rate", "test accuracy", "test loss", "training loss"]
    header += ["steps to Adam's loss", "step reduction"]
    if config.short_steps:
        header.append("shortest run that ends there")
    header.append("diverged")
    if config.long_steps:
        header.append(f"diverged in {config.long_steps:,} steps")
    return markdown_table(header, [row(task, *pair) for task, of in numbers.items() for pair in of.items()], titles=2)


def format_costs(numbers: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """What the optimizers cost, as a table in Markdown."""

    def size(count: int | None) -> str:
        return "unknown" if count is None else f"{count / 1e3:,.1f} kB"

    header = ["", "optimizer", "ms per update", "ms per gradient", "state", "temporaries"]
    rows = [
        [
            task,
            title,
            f"{of['update_ms']:.2f}",
            f"{of['gradient_ms']:.2f}",
            size(of["state_bytes"]),
            size(of["temporary_bytes"]),
        ]
        for task, of_task in numbers.items()
        for title, of in of_task.items()
    ]
    return markdown_table(header, rows, titles=2)


def draw_curves(outcomes: Mapping[str, Mapping[str, Outcome]]) -> Figure:
    """Training losses of every task: running means, the mean over the seeds and all between lowest and highest."""
    columns = min(3, len(outcomes))
    lines = math.ceil(len(outcomes) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.8 * lines), squeeze=False)
    for axis in axes.flat[len(outcomes) :]:
        axis.set_axis_off()
    for axis, (task, of_task) in zip(axes.flat, outcomes.items(), strict=False):
        for number, (title, outcome) in enumerate(of_task.items()):
            curves = running_mean(np.array([run.train_losses for run in outcome.runs]))
            num_steps = len(outcome.runs[0].train_losses)
            steps = np.arange(num_steps - curves.shape[1] + 1, num_steps + 1)
            label = title if outcome.rate is None else f"{title}, {outcome.rate:.3g}"
            axis.fill_between(steps, curves.min(0), curves.max(0), color=f"C{number % 10}", alpha=0.2, linewidth=0)
            axis.plot(steps, curves.mean(0), color=f"C{number % 10}", label=label)
        end = running_mean(mean_losses(of_task[BASELINE].runs))[-1]
        axis.axhline(end, color="black", linestyle="--", linewidth=0.8, label="Adam's final loss")
        axis.set(title=task, xlabel="step", ylabel="training loss", yscale="log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(mpl.ticker.LogFormatter())  # plain numbers
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="small", title="with its peak rate", title_fontsize="small")
    figure.tight_layout()
    return figure


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    mpl.use("agg")
    main(tyro.cli(Config, description=__doc__))
