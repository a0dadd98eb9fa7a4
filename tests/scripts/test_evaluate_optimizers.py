"""The script end to end, with small networks on the digits."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import image

from ngjax.metatrain import comparison
from ngjax.metatrain.comparison import RunResult
from ngjax.metatrain.tasks import find_task, load_task_data, sample_batch
from ngjax.metatrain.unroll import RunSettings, Trainer, start_run, warmup_cosine
from ngjax.optimizers import init_meta_params
from ngjax.optimizers.meta_file import load_meta_params, save_meta_params

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "evaluate_optimizers.py"
TASK = "digits-mlp-8-relu"
STEPS = 30
RATES = (1e-3, 3e-2, 1e3)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate_optimizers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate_optimizers"] = module  # where dataclasses look up the annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["evaluate_optimizers"]


def config(script, out, **changes):
    small = {
        "tasks": (TASK,),
        "optimizers": ("adam",),
        "steps": STEPS,
        "seeds": (0, 1),
        "tuning_seeds": (8, 9),
        "rates": RATES,
        "learned_rates": (1e-3,),
    }
    return script.Config(out=out, **{**small, **changes})


@pytest.fixture(scope="module")
def meta_params(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta") / "feed-forward"
    folder.mkdir()
    theta = jax.device_get(init_meta_params(jax.random.key(0), "ff"))
    save_meta_params(folder / "meta_params.safetensors", theta, {"rule": "ff", "step": "normalized"})
    return folder / "meta_params.safetensors"


@pytest.fixture(scope="module")
def run(script, meta_params, tmp_path_factory):
    """Configuration, results and folder."""
    of = config(script, tmp_path_factory.mktemp("evaluation") / "new" / "folder", meta_params=(meta_params,))
    return of, script.main(of), of.out


def test_results_are_complete(run, meta_params):
    _, results, out = run
    assert json.loads((out / "results.json").read_text()) == results
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "results.json", "runs"]
    assert image.imread(out / "curves.png").shape[2] == 4
    assert [*results["tasks"]] == [TASK]
    assert [*results["tasks"][TASK]] == ["adam", "feed-forward"]
    assert len(results["table"]) == len(results["cost_table"]) == 2 + 2
    assert [*results["versions_of_meta_params"]] == ["feed-forward"]
    assert results["config"]["schedule"] == "cosine"
    assert {"machine", "versions", "date", "command"} <= set(results)
    for of in results["tasks"][TASK].values():
        assert [seed["seed"] for seed in of["seeds"]] == [0, 1]
        assert of["update_ms"] > 0
        assert of["gradient_ms"] == results["tasks"][TASK]["adam"]["gradient_ms"] > 0
    assert results["tasks"][TASK]["feed-forward"]["peak_rate"] == 1e-3
    assert results["tasks"][TASK]["feed-forward"]["tuning"] == []


def test_programs_are_let_go_of(script, run):
    # Those of many optimizers and tasks are more than a process may hold.
    script.main(run[0])
    assert comparison._train._cache_size() == 0


@functools.cache
def programs():
    """Task, data, the start of a run, and a step with Adam."""
    task, data = find_task(TASK), load_task_data("digits")
    untrained = Trainer(task, lambda *_: optax.identity(), RunSettings(scale_spread=1.0))

    def adam(peak):
        return optax.adam(lambda count: warmup_cosine(peak, jnp.int32(STEPS), 0.05, count))

    def step(params, state, gradient, key, peak):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = adam(peak).update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        batch = sample_batch(key, data.train, task.batch_size)
        return params, state, *jax.value_and_grad(task.loss)(params, batch)

    return task, data, jax.jit(lambda key: start_run(untrained, {}, key, data)), adam(jnp.float32(1)), jax.jit(step)


def by_hand(rate, seed):
    """Losses of Adam after each step, test loss and test accuracy, with a loop and optax."""
    task, data, start_of, adam, step = programs()
    start = start_of(jax.random.key(seed))
    params, state, gradient, losses = start.params, adam.init(start.params), start.gradient, []
    for count in range(STEPS):
        key = jax.random.fold_in(start.key, count)
        params, state, loss, gradient = step(params, state, gradient, key, jnp.float32(rate))
        losses.append(float(loss))
    return np.array(losses), float(task.loss(params, data.test)), float(task.accuracy(params, data.test))


def test_numbers_of_adam_are_those_of_a_loop_with_optax(run):
    _, results, _ = run
    adam = results["tasks"][TASK]["adam"]
    tuned = {rate: np.mean([by_hand(rate, seed)[0][-20:].mean() for seed in (8, 9)]) for rate in RATES[:2]}
    received = {row["peak_rate"]: row["train_loss"] for row in adam["tuning"]}
    assert received.pop(RATES[2]) is None  # it diverged
    assert received == pytest.approx(tuned, rel=1e-3)
    assert adam["peak_rate"] == min(tuned, key=tuned.get) == 3e-2
    assert not adam["at_end_of_grid"]
    runs = [by_hand(3e-2, seed) for seed in (0, 1)]
    losses, test_losses, accuracies = (np.array(column) for column in zip(*runs, strict=True))
    final = losses[:, -10:].mean(1)
    expected = {
        "test_loss": test_losses.mean(),
        "test_loss_deviation": test_losses.std(ddof=1),
        "test_accuracy": accuracies.mean(),
        "test_accuracy_deviation": accuracies.std(ddof=1),
        "train_loss": final.mean(),
        "train_loss_deviation": final.std(ddof=1),
    }
    assert {name: adam[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert [seed["train_loss"] for seed in adam["seeds"]] == pytest.approx(final.tolist(), rel=1e-3)
    curve = np.convolve(losses.mean(0), np.ones(20) / 20, mode="valid")
    steps = 20 + int(np.argmax(curve <= curve[-1]))
    assert (adam["steps_to_baseline"], adam["step_reduction"], adam["diverged"]) == (steps, 1.0, 0)
    cells = [cell.strip() for cell in results["table"][2].split("|")[1:-1]]
    assert cells[:3] == [TASK, "adam", "0.03"]
    assert cells[3] == f"{adam['test_accuracy']:.2%} ± {adam['test_accuracy_deviation']:.2%}"
    assert cells[6:] == [str(steps), "1.00", "0 of 2"]


def count_runs(script, monkeypatch, *, until=None):
    """Calls of `run_once` from now on; the one after `until` is a kill."""
    calls, run_once = [], script.run_once

    def counted(trainer, theta, data, *, peak_rate, seed):
        if len(calls) == until:
            raise KeyboardInterrupt
        calls.append((peak_rate, seed))
        return run_once(trainer, theta, data, peak_rate=peak_rate, seed=seed)

    monkeypatch.setattr(script, "run_once", counted)
    return calls


def without_times(results):
    rows = [
        {name: number for name, number in of.items() if not name.endswith("_ms")}
        for of in results["tasks"][TASK].values()
    ]
    return rows, [results[name] for name in ("table", "config", "versions_of_meta_params")]


def test_a_killed_evaluation_goes_on_and_ends_like_any_other(script, run, meta_params, tmp_path, monkeypatch):
    _, results, _ = run
    of = config(script, tmp_path, meta_params=(meta_params,))
    with monkeypatch.context() as patch:
        count_runs(script, patch, until=7)
        with pytest.raises(KeyboardInterrupt):
            script.main(of)
    assert not (tmp_path / "results.json").exists()
    calls = count_runs(script, monkeypatch)
    resumed = script.main(of)
    assert len(calls) == (3 * 2 + 2 + 2) - 7
    received, expected = without_times(resumed), without_times(results)
    expected[1][1]["meta_params"] = received[1][1]["meta_params"]
    assert received == expected


def test_what_is_there_is_not_computed_again(script, run, monkeypatch):
    of, results, _ = run
    calls = count_runs(script, monkeypatch)
    again = script.main(of)
    assert calls == []
    assert {name: again[name] for name in ("tasks", "table", "cost_table")} == {
        name: results[name] for name in ("tasks", "table", "cost_table")
    }
    (path,) = (
        path
        for path in (of.out / "runs").iterdir()
        if json.loads(path.read_text())["of"].get("seed") == 1 and '"optimizer": "adam"' in path.read_text()
    )
    path.unlink()
    assert script.main(of)["tasks"] == results["tasks"]
    assert [seed for _, seed in calls] == [1]


def nothing_runs(script, monkeypatch):
    """Lists of all runs and of all costs that are asked for from now on: whether each is of a learned optimizer."""
    runs, costs = [], []

    def run_once(trainer, theta, data, **_):
        runs.append(bool(theta))
        return RunResult(2.5, np.ones(STEPS, np.float32), 1.0, 0.5)

    def update_cost(trainer, theta, data):
        costs.append(bool(theta))
        return script.UpdateCost(0.1, 8, None)

    monkeypatch.setattr(script, "run_once", run_once)
    monkeypatch.setattr(script, "update_cost", update_cost)
    return runs, costs


def test_runs_are_remembered_for_the_versions_and_times_for_the_machine_they_are_of(script, tmp_path, monkeypatch):
    runs, costs = nothing_runs(script, monkeypatch)
    of = config(script, tmp_path, seeds=(0,), rates=(1e-2,))
    for module_function, told, expected in (
        (None, None, (1, 1)),
        ("describe_machine", {"processor": "another"}, (1, 2)),
        ("describe_versions", {"ngjax": "another"}, (2, 3)),
    ):
        if module_function is not None:
            monkeypatch.setattr(script, module_function, lambda told=told: told)
        script.main(of)
        assert (len(runs), len(costs)) == expected


def test_runs_are_remembered_for_meta_parameters_and_schedule(script, meta_params, tmp_path, monkeypatch):
    runs, _ = nothing_runs(script, monkeypatch)
    path, (theta, facts) = tmp_path / "ff.safetensors", load_meta_params(meta_params)
    of = config(script, tmp_path / "out", seeds=(0,), rates=(1e-2,), meta_params=(path,))
    cases = ((0, "cosine", [False, True]), (1, "cosine", [True]), (1, "constant", [False, True]))
    for change, schedule, expected in cases:
        save_meta_params(path, jax.tree.map(lambda leaf, c=change: leaf + np.float32(c), theta), facts)
        script.main(dataclasses.replace(of, schedule=schedule))
        assert runs == expected
        runs.clear()


def test_learned_optimizers_in_the_papers_form_are_not_tuned_but_run_for_long(script, tmp_path, monkeypatch):
    theta = jax.device_get(init_meta_params(jax.random.key(1), "ff"))
    save_meta_params(tmp_path / "ff.safetensors", theta, {"rule": "ff", "step": "paper"})

    def linear(trainer, theta, data, *, peak_rate, seed):
        (num_steps,) = trainer.settings.horizons
        return RunResult(2.5, np.linspace(2, 1, num_steps, dtype=np.float32), 1.0, 0.5)

    monkeypatch.setattr(script, "run_once", linear)
    files = {"meta_params": (tmp_path / "ff.safetensors",)}
    results = script.main(config(script, tmp_path / "out", seeds=(0,), rates=(1e-2,), long_steps=40, **files))
    ff, adam = (results["tasks"][TASK][name] for name in ("ff", "adam"))
    assert ff["peak_rate"] is None
    assert ff["tuning"] == []
    assert ff["long"]["steps"] == 40
    assert ff["long"]["train_loss"] == pytest.approx(np.linspace(2, 1, 40)[-10:].mean())
    assert len(ff["long"]["seeds"]) == 1
    assert adam["long"] is None
    assert adam["test_loss_deviation"] is None
    assert results["table"][0].split("|")[-2].strip() == "diverged in 40 steps"
    assert " none " in results["table"][3]


def test_the_shortest_run_that_ends_where_adam_ends(script, meta_params, tmp_path, monkeypatch):
    def flat(trainer, theta, data, *, peak_rate, seed):
        (num_steps,) = trainer.settings.horizons
        loss = 0.9 if theta and num_steps >= 15 else 1.0 if num_steps >= STEPS else 1.5
        loss += 0 if peak_rate in (1e-3, 3e-2) else 9  # the rates that are to be chosen
        return RunResult(2.5, np.full(num_steps, loss, np.float32), 1.0, 0.5)

    monkeypatch.setattr(script, "run_once", flat)
    options = {"short_steps": (20, 10, 15), "long_steps": 40, "rates": (1e-2, 3e-2), "meta_params": (meta_params,)}
    of_task = script.main(config(script, tmp_path, **options))["tasks"][TASK]
    adam, ff = of_task["adam"], of_task["feed-forward"]
    assert (adam["shortest_run"], ff["shortest_run"]) == (STEPS, 15)
    assert [short["steps"] for short in ff["short"]] == [20, 10, 15]
    assert [short["train_loss"] for short in ff["short"]] == pytest.approx([0.9, 1.5, 0.9])
    assert ff["long"]["steps"] == 40
    assert (len(adam["short"]), adam["long"]) == (3, None)
    header, _, *rows = json.loads((tmp_path / "results.json").read_text())["table"]
    column = [cell.strip() for cell in header.split("|")].index("shortest run that ends there")
    assert [row.split("|")[column].strip() for row in rows] == ["30", "15"]


def test_longer_runs_are_no_short_ones(script):
    runs = [RunResult(2.5, np.full(STEPS, 1.5, np.float32), 1.0, 0.5)]
    longer = [RunResult(2.5, np.full(50, 0.5, np.float32), 1.0, 0.5)]
    outcome = script.Outcome(1e-2, {}, runs, {50: longer}, script.UpdateCost(0.1, 8, None), 0.2)
    assert script.shortest_run(outcome, np.full(STEPS, 1.0)) is None


def test_runs_that_diverge_are_counted_and_are_not_numbers_in_the_results(script, tmp_path):
    lost = RunResult(2.3, np.full(STEPS, np.nan, np.float32), float("nan"), 0.1)
    cost = script.UpdateCost(0.1, 8, None)
    bad, good = (
        script.Outcome(1e-2, {}, [lost._replace(train_losses=losses, test_loss=loss), lost], {}, cost, 0.2)
        for losses, loss in ((lost.train_losses, float("inf")), (np.linspace(2, 1, STEPS), 1.0))
    )
    good = good._replace(runs=good.runs[:1] * 2)
    results = script.summarize(config(script, tmp_path), [], {TASK: {"adam": good, "sgd": bad}})
    sgd = results["tasks"][TASK]["sgd"]
    assert (sgd["diverged"], sgd["test_loss"], sgd["steps_to_baseline"], sgd["step_reduction"]) == (2, None, None, None)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert "not reached | " in results["table"][3]
    assert "2 of 2" in results["table"][3]
    assert "unknown" in results["cost_table"][3]
    record = script.without_nan(lost._asdict() | {"train_losses": lost.train_losses.tolist()})
    np.testing.assert_equal(script.with_nan(record)._asdict(), lost._asdict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizers": ("adam", "adagrad")}, r"unknown optimizer 'adagrad'; known are adam"),
        ({"tasks": ("digits-mlp",)}, r"unknown task 'digits-mlp'; expected a name like"),
        ({"optimizers": ("sgd",)}, r"optimizers=\('sgd',\): expected adam"),
        ({"tuning_seeds": (1, 2)}, r"seeds \[1\] are in both"),
        ({"seeds": ()}, r"seeds=\(\): expected at least one"),
        ({"rates": (0.1, 0.1)}, r"rates=.*none twice"),
        ({"short_steps": (STEPS,)}, r"short_steps=\(30,\): expected fewer than steps=30"),
        ({"short_steps": (9, 9)}, r"short_steps=\(9, 9\): .* none twice"),
        ({"long_steps": STEPS}, r"long_steps=30: expected more than steps=30"),
        ({"steps": 0}, r"steps=0, .*expected steps and rates above 0"),
        ({"meta_params": ("adam.safetensors",)}, r"adam.safetensors"),
    ],
)
def test_settings_that_cannot_be_are_refused(script, changes, message, tmp_path):
    changes = {**changes, "meta_params": tuple(tmp_path / name for name in changes.get("meta_params", ()))}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        script.main(config(script, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_two_of_the_same_name_are_refused(script, meta_params, tmp_path):
    with pytest.raises(ValueError, match=r"same name among adam, feed-forward, feed-forward"):
        script.main(config(script, tmp_path / "out", meta_params=(meta_params, meta_params)))


def test_time_left_goes_by_the_runs_so_far(script):
    adam, ff = ("a", "adam", 10), ("a", "ff", 10)
    work = script.Work(100.0, [adam, ff])
    assert work.left() == 100
    work.done(adam, 10.0, 25.0)  # 15 s of it to compile
    assert work.left() == 90 + 15
    work.done(adam, 10.0, 20.0)
    assert work.left() == 2 * 80 + 15
    work.done(ff, 10.0, None)  # it was there already
    assert work.left() == 2 * 70
