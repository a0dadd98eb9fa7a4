import logging
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngjax import train
from tests.train import small_run


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), ours, theirs)


def test_one_and_eight_devices_agree():
    one, eight = (
        train.fit(**small_run.arguments(num_steps=10, mesh=train.data_mesh(devices)))
        for devices in (jax.devices()[:1], jax.devices())
    )
    assert len(jax.tree.leaves(one.state.params)[0].devices()) == 1
    assert len(jax.tree.leaves(eight.state.params)[0].devices()) == 8
    assert_close(one.state.params, eight.state.params)
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), eight.state.params, small_run.initial_params())
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.fixture
def compiled_steps(caplog):
    """Counts the compilations of the training step so far."""
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        yield lambda: len(re.findall(r"Finished XLA compilation of jit\(train_step\)", caplog.text))


def test_the_step_compiles_once(tmp_path, compiled_steps):
    arguments = small_run.arguments(directory=tmp_path, if_exists="resume")
    train.fit(**{**arguments, "num_steps": 12})
    assert compiled_steps() == 1
    train.fit(**{**arguments, "num_steps": 24})
    assert compiled_steps() == 2


def test_parameters_that_meet_the_rows_stay_replicated(compiled_steps):
    """Left to itself, XLA would give these parameters the sharding of the batch."""
    result = train.fit(
        lambda params, batch, key: (jnp.mean((batch - params) ** 2), {}),
        np.zeros((16, 3), np.float32),
        lambda step: np.ones((16, 3), np.float32),
        optimizer=optax.sgd(0.1),
        num_steps=3,
        key=jax.random.key(0),
    )
    assert compiled_steps() == 1
    assert result.state.params.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("eval_every", "expected"),
    [(None, [10]), (3, [3, 6, 9, 10]), (5, [5, 10]), (10, [10]), (11, [10])],
)
def test_evaluates_when_due_and_once_at_the_end(eval_every, expected):
    losses = []

    def evaluate(params):
        losses.append(float(jnp.sum(params)))
        return {"sum": losses[-1]}

    result = train.fit(
        lambda params, batch, key: (jnp.mean(batch * params), {}),
        jnp.zeros(1),
        lambda step: np.ones((8, 1), np.float32),
        optimizer=optax.sgd(-1.0),
        num_steps=10,
        key=jax.random.key(0),
        evaluate=evaluate,
        eval_every=eval_every,
        log_every=100,
    )
    # Each step adds one to the parameter, so its value tells after which step it was seen.
    assert losses == expected
    assert [(row["step"], row["eval/sum"]) for row in result.history] == list(zip(expected, expected, strict=True))


def test_numbers_are_fetched_after_the_next_step_is_dispatched(tmp_path):
    rows_seen = []

    def batch_at(step):
        rows_seen.append(len(train.read_metrics(tmp_path / "metrics.jsonl")))
        return small_run.batch_at(step)

    train.fit(
        **small_run.arguments(
            directory=tmp_path, batch_at=batch_at, num_steps=6, log_every=1, eval_every=None, save_every=None
        )
    )
    # When the batch of step k is asked for, k - 1 steps are dispatched and k - 2 were waited for.
    assert rows_seen == [0, 0, 1, 2, 3, 4]
    assert len(train.read_metrics(tmp_path / "metrics.jsonl")) == 6


def test_initial_parameters_survive():
    params = jax.tree.map(jnp.asarray, small_run.initial_params())
    train.fit(**small_run.arguments(params=params, num_steps=2))
    assert_close(params, small_run.initial_params())


def test_optimizers_may_keep_the_parameters_in_their_state():
    """Neither may one buffer be donated as two, nor the caller's at all."""
    optimizer = optax.GradientTransformation(
        lambda params: params, lambda updates, state, params=None: (updates, state)
    )
    params = jax.tree.map(jnp.asarray, small_run.initial_params())
    mesh = train.data_mesh(jax.devices()[:1])
    train.fit(**small_run.arguments(optimizer=optimizer, params=params, num_steps=2, mesh=mesh))
    assert_close(params, small_run.initial_params())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"save_every": 4}, [4, 8, 10]),
        ({"save_every": None, "save_every_seconds": None}, [10]),
        # The clock is looked at whenever a row is due.
        ({"save_every": None, "save_every_seconds": 0.0, "log_every": 3}, [3, 6, 9, 10]),
        ({"save_every": None, "save_every_seconds": 1e9, "log_every": 3}, [10]),
        ({"save_every": 2, "keep": 2}, [8, 10]),
    ],
)
def test_saves_when_due_and_at_the_end(tmp_path, changes, expected):
    train.fit(**small_run.arguments(**{"directory": tmp_path, "num_steps": 10, "keep": 9, **changes}))
    assert sorted(int(name) for name in os.listdir(tmp_path / "checkpoints")) == expected


def test_in_memory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train.fit(**small_run.arguments(num_steps=3))
    assert [row["step"] for row in result.history] == [3]
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_ends_the_run_unsaved(tmp_path):
    def batch_at(step):
        batch = small_run.batch_at(step)
        return {**batch, "targets": batch["targets"] * (np.float32(np.inf) if step == 3 else 1)}

    arguments = small_run.arguments(directory=tmp_path, batch_at=batch_at, save_every=1, num_steps=10)
    with pytest.raises(FloatingPointError, match="loss of step 4 is inf"):
        train.fit(**arguments)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "3"]


def test_folder_of_another_run_is_refused(tmp_path):
    train.fit(**small_run.arguments(directory=tmp_path, num_steps=1))
    with pytest.raises(FileExistsError, match=f"{tmp_path} already holds a run"):
        train.fit(**small_run.arguments(directory=tmp_path, num_steps=1))
    result = train.fit(**small_run.arguments(directory=tmp_path, num_steps=2, if_exists="overwrite"))
    assert [row["step"] for row in result.history] == [2]


@pytest.mark.parametrize("name", ["num_steps", "eval_every", "log_every", "save_every", "keep"])
def test_counts_below_one(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        train.fit(**small_run.arguments(**{name: 0}))


def test_mesh_with_other_axes():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=2 * (jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match=r"\('data', 'model'\), expected \('data',\)"):
        train.fit(**small_run.arguments(mesh=mesh))
