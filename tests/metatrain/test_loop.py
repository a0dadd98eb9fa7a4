import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngjax import train
from ngjax.metatrain.estimators import PES, OneStep, PaperScheme
from ngjax.metatrain.loop import meta_train, paper_optimizer
from ngjax.metatrain.unroll import RunSettings, Trainer
from tests.metatrain import one_of_two, quadratic
from tests.two_processes import run_two

SETTINGS = RunSettings((6, 12), (0.1, 1.0), scale_spread=2.0)
OPTIMIZER = optax.adam(0.05)  # one object, so that its programs are compiled once
FAMILY = [Trainer(quadratic.TASK, quadratic.scheduled, SETTINGS), Trainer(quadratic.TASK, quadratic.momentum, SETTINGS)]


def run(num_steps, *, devices=1, estimator=None, **changes):
    arguments = {
        "trainers": FAMILY,
        "data": {"points": quadratic.points()},
        "theta": quadratic.theta(),
        "estimator": estimator or OneStep(truncation=6),
        "optimizer": OPTIMIZER,
        "num_steps": num_steps,
        "runs": 8,
        "key": jax.random.key(7),
        "mesh": train.data_mesh(jax.devices()[:devices]),
    }
    return meta_train(**{**arguments, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(9, directory=folder), folder


def numbers(history):
    return [{name: value for name, value in row.items() if name != "time"} for row in history]


def test_every_outer_step_is_logged_with_the_task_in_turn(whole):
    result, folder = whole
    assert [row["step"] for row in result.history] == list(range(1, 10))
    assert [row["task"] for row in result.history] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert {"loss", "last_loss", "diverged", "grad_norm"} <= result.history[0].keys()
    assert train.read_metrics(folder / "metrics.jsonl") == result.history


@pytest.mark.parametrize("estimator", [PES(6), PaperScheme(6)], ids=["pes", "paper"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(estimator, tmp_path):
    arguments = {"estimator": estimator, "trainers": FAMILY[1:]}
    whole = run(5, **arguments)
    run(3, directory=tmp_path, **arguments)
    taken_up = run(5, directory=tmp_path, if_exists="resume", **arguments)
    jax.tree.map(np.testing.assert_array_equal, taken_up.theta, whole.theta)
    assert numbers(taken_up.history) == numbers(whole.history)


def test_a_run_that_was_killed_between_checkpoints_ends_with_the_same_bits(whole, tmp_path, monkeypatch):
    """Steps after the last checkpoint are made again, and logged once."""

    class Killed(Exception):
        pass

    update = train.Progress.update

    def killing(self, step, loss):
        update(self, step, loss)
        if step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train.Progress, "update", killing)
        with pytest.raises(Killed):
            run(9, directory=tmp_path, save_every=4)
    taken_up = run(9, directory=tmp_path, if_exists="resume")
    jax.tree.map(np.testing.assert_array_equal, taken_up.theta, whole[0].theta)
    assert numbers(taken_up.history) == numbers(whole[0].history)


def test_devices_share_the_runs_and_change_nothing(whole):
    many = run(9, devices=8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), many.theta, whole[0].theta)
    for row, other in zip(numbers(many.history), numbers(whole[0].history), strict=True):
        assert row == pytest.approx(other, rel=1e-4)


def test_two_processes_share_the_runs_and_end_as_one(whole, tmp_path):
    errors = run_two(one_of_two.__file__, tmp_path)
    assert ["step 9/9" in error for error in errors] == [True, False]
    for index in range(2):
        with np.load(tmp_path / f"final-{index}.npz") as final:
            np.testing.assert_array_equal(final["steps"], range(1, 10))
            for name, leaf in whole[0].theta.items():
                np.testing.assert_allclose(final[name], leaf, rtol=1e-5)
    for row, other in zip(
        numbers(train.read_metrics(tmp_path / "metrics.jsonl")), numbers(whole[0].history), strict=True
    ):
        assert row == pytest.approx(other, rel=1e-4)


def test_how_many_runs_are_computed_at_once_changes_nothing(whole):
    together = run(9, runs_at_once=8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), together.theta, whole[0].theta)


@pytest.mark.parametrize("estimator", [OneStep(6), PES(6)], ids=["one-step", "pes"])
def test_meta_training_lowers_the_loss_from_rates_too_small(estimator):
    result = run(80, estimator=estimator, trainers=FAMILY[1:], theta=quadratic.theta(-5.0))
    losses = [row["loss"] for row in result.history]
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.3
    assert result.theta["log_rate"] > -4


def test_bad_arguments(whole, tmp_path):
    with pytest.raises(ValueError, match="no tasks"):
        run(1, trainers=[])
    with pytest.raises(ValueError, match="runs=6: expected a multiple of 4, the number of devices"):
        run(1, runs=6, devices=4)
    folder = whole[1]
    with pytest.raises(FileExistsError):
        run(9, directory=folder)
    with pytest.raises(ValueError, match="holds a run of 9 outer steps, but num_steps=3"):
        run(3, directory=folder, if_exists="resume")
    with pytest.raises(ValueError, match="holds a run with another key"):
        run(9, directory=folder, if_exists="resume", key=jax.random.key(8))
    with pytest.raises(ValueError, match="is not of this run"):
        run(9, directory=folder, if_exists="resume", runs=16)


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(FloatingPointError, match="loss of outer step 1 is nan"):
        run(3, estimator=PaperScheme(60), theta=quadratic.theta(8.0), trainers=FAMILY[1:])


@dataclasses.dataclass(frozen=True)
class NoGradient(OneStep):
    def estimate(self, *arguments):
        estimate = super().estimate(*arguments)
        return estimate._replace(gradient=jax.tree.map(lambda leaf: leaf * jnp.nan, estimate.gradient))


def test_a_gradient_that_is_not_finite_stops_the_run():
    with pytest.raises(FloatingPointError, match="grad_norm of outer step 1 is nan"):
        run(3, estimator=NoGradient(truncation=6))


def test_the_papers_optimizer_is_adam_with_coupled_decay_along_a_cosine():
    optimizer = paper_optimizer(10)
    theta = jnp.array([1.0, -2.0])
    state = optimizer.init(theta)
    first, second, expected = np.zeros(2), np.zeros(2), np.array([1.0, -2.0])
    for step in range(4):
        gradient = np.array([0.3, -1e-4]) * (step + 1)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, theta)
        theta = optax.apply_updates(theta, updates)
        decayed = gradient + 1e-4 * expected
        first, second = 0.9 * first + 0.1 * decayed, 0.999 * second + 0.001 * decayed**2
        rate = 3e-4 * (1 + np.cos(np.pi * step / 10)) / 2
        corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        expected = expected - rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        np.testing.assert_allclose(theta, expected, rtol=1e-6)
