import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from ngjax.metatrain.comparison import (
    DIVERGED_ABOVE,
    HAND_MADE,
    LAST_STEPS,
    SGD_MOMENTUM,
    WINDOW,
    RunResult,
    best_rate,
    final_loss,
    fingerprint,
    gradient_milliseconds,
    hand_made,
    has_diverged,
    learned,
    make_trainer,
    median_milliseconds,
    run_once,
    running_mean,
    step_reduction,
    steps_to_reach,
    tuning_loss,
    update_cost,
)
from ngjax.metatrain.tasks import Batch, sample_batch
from ngjax.metatrain.unroll import start_run, warmup_cosine
from ngjax.optimizers import PAPER_RULES, RULES, init_meta_params
from ngjax.optimizers.meta_file import MetaFile, save_meta_params
from tests.metatrain import quadratic

STEPS = 25


def result(losses, first=1.0):
    return RunResult(first, np.asarray(losses, np.float32), 0.5, 0.5)


# -- who takes part ---------------------------------------------------------------------------------------------------


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"unknown optimizer 'adagrad'; known are adam, adamw, sgd, muon"):
        hand_made("adagrad")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adam", optax.adam(0.1)),
        ("adamw", optax.adamw(0.1, weight_decay=0.01)),
        ("sgd", optax.sgd(0.1, momentum=0.9)),
        ("muon", optax.contrib.muon(0.1)),
    ],
)
def test_optimizers_by_name_are_those_of_optax(name, expected):
    params, gradient = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, {"w": jnp.eye(2, 3), "b": jnp.arange(3.0)}

    def update(optimizer):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            return optimizer.update(gradient, optimizer.init(params), params)[0]

    found = update(hand_made(name).make_optimizer({}, quadratic.TASK, lambda count: jnp.float32(0.1)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, update(expected))


def fresh_theta(rule):
    shapes = jax.eval_shape(lambda key: init_meta_params(key, rule), jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.mark.parametrize("rules", [RULES, PAPER_RULES])
def test_files_are_known_by_their_folder_and_say_whose_meta_parameters_they_hold(rules, tmp_path):
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "meta_params.safetensors"
    step = "normalized" if rules is RULES else "paper"
    save_meta_params(path, fresh_theta(rules["ng-t"]), {"rule": "ng-t", "step": step})
    candidate = learned(path)
    assert candidate.name == "mine"
    assert candidate.is_learned
    assert candidate.has_rate == (step == "normalized")
    assert candidate.make_optimizer.rule == rules["ng-t"]
    assert candidate.make_optimizer.step == step
    other = path.with_name("other.safetensors")
    save_meta_params(other, {"a": np.ones(1, np.float32)}, {"rule": "ff", "step": step})
    with pytest.raises(ValueError, match=r"other.safetensors does not hold meta-parameters of ff: .*dense_0"):
        learned(other)
    path.rename(tmp_path / "mine" / "best.safetensors")
    renamed = learned(tmp_path / "mine" / "best.safetensors")
    assert (renamed.name, renamed.version) == ("best", candidate.version)
    # The version is that of what is used: not of how it came about, but of arrays, rule and step.
    theta, facts = fresh_theta(rules["ng-t"]), {"rule": "ng-t", "step": step}
    assert fingerprint(MetaFile(theta, {**facts, "date": "2026"})) == candidate.version
    other_step = {**facts, "step": "paper" if step == "normalized" else "normalized"}
    assert fingerprint(MetaFile(theta, other_step)) != candidate.version
    assert fingerprint(MetaFile(jax.tree.map(lambda leaf: leaf + 1, theta), facts)) != candidate.version


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"step": "paper"}, "does not say which rule"),
        ({"rule": "gru", "step": "paper"}, "unknown rule 'gru'; known"),
        ({"rule": "ff", "step": "other"}, "unknown step 'other'; known"),
    ],
)
def test_files_without_a_known_rule_are_refused(metadata, message, tmp_path):
    save_meta_params(tmp_path / "a.safetensors", {"a": np.ones(1, np.float32)}, metadata)
    with pytest.raises(ValueError, match=f"a.safetensors .*{message}"):
        learned(tmp_path / "a.safetensors")


# -- runs -------------------------------------------------------------------------------------------------------------


START = jax.jit(
    lambda key: start_run(
        make_trainer(hand_made("sgd"), quadratic.TASK, "constant", STEPS), {}, key, quadratic.points()
    )
)


def by_hand(optimizer, seed):
    """First loss, losses and parameters of a loop with optax."""
    task, data, start = quadratic.TASK, quadratic.points(), START(jax.random.key(seed))
    params, state, gradient, losses = start.params, optimizer.init(start.params), start.gradient, []

    @jax.jit
    def step(params, state, gradient, key):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        batch = sample_batch(key, data.train, task.batch_size)
        return params, state, *jax.value_and_grad(task.loss)(params, batch)

    for count in range(STEPS):
        params, state, loss, gradient = step(params, state, gradient, jax.random.fold_in(start.key, count))
        losses.append(float(loss))
    return float(start.loss), losses, params


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_runs_are_those_of_a_loop_with_optax(schedule):
    def rate(count):
        return warmup_cosine(jnp.float32(0.1), jnp.int32(STEPS), 0.05, count) if schedule == "cosine" else 0.1

    task, data = quadratic.TASK, quadratic.points()
    trainer = make_trainer(hand_made("sgd"), task, schedule, STEPS)
    received = run_once(trainer, {}, data, peak_rate=0.1, seed=3)
    first_loss, losses, params = by_hand(optax.sgd(rate, momentum=SGD_MOMENTUM), 3)
    np.testing.assert_allclose(received.first_loss, first_loss, rtol=1e-5)
    np.testing.assert_allclose(received.train_losses, losses, rtol=1e-4)
    np.testing.assert_allclose(received.test_loss, task.loss(params, data.test), rtol=1e-4)
    np.testing.assert_allclose(received.test_accuracy, task.accuracy(params, data.test), rtol=1e-4)


def test_at_a_seed_all_optimizers_meet_the_same_network_and_batches():
    def standing(name, seed):
        trainer = make_trainer(hand_made(name), quadratic.TASK, "constant", STEPS)
        return run_once(trainer, {}, quadratic.points(), peak_rate=0.0, seed=seed)

    first, *others = [standing(name, 1) for name in HAND_MADE]
    for other in others:
        np.testing.assert_array_equal(other.train_losses, first.train_losses)
        assert other.first_loss == first.first_loss
    assert np.ptp(first.train_losses) > 0  # batches differ from step to step
    assert not np.any(standing("sgd", 2).train_losses == first.train_losses)


def test_all_test_examples_count_the_same():
    data = quadratic.points()
    many = Batch(jnp.tile(data.test.inputs, (40, 1))[:1234], jnp.zeros(1234, jnp.int32))  # in parts of 1000
    trainer = make_trainer(hand_made("sgd"), quadratic.TASK, "constant", STEPS)
    received = run_once(trainer, {}, data._replace(test=many), peak_rate=0.0, seed=0)
    params = START(jax.random.key(0)).params
    np.testing.assert_allclose(received.test_loss, quadratic.TASK.loss(params, many), rtol=1e-5)


# -- what is read off the losses --------------------------------------------------------------------------------------


def test_running_means_end_with_the_run():
    losses = np.arange(3.0 * (WINDOW + 4)).reshape(3, -1) ** 2
    curve = running_mean(losses)
    assert curve.shape == (3, 5)
    np.testing.assert_allclose(curve[:, -1], losses[:, -WINDOW:].mean(1))
    np.testing.assert_allclose(curve[:, 0], losses[:, :WINDOW].mean(1))
    np.testing.assert_allclose(running_mean(losses[:, :3]), losses[:, :3].mean(1, keepdims=True))


def test_steps_to_reach_a_loss():
    falling = np.linspace(2, 1, 101)  # the running mean lies 0.095 above
    assert steps_to_reach(falling, 1.5) == 1 + next(s for s in range(101) if falling[s] + 0.095 <= 1.5 + 1e-9)
    assert steps_to_reach(falling, 5.0) == WINDOW
    assert steps_to_reach(falling, 1.0) is None
    assert steps_to_reach(np.full(101, np.nan), 1.0) is None
    spike = np.where(np.arange(101) == 50, 0.0, 2.0)
    assert steps_to_reach(spike, 1.5) is None  # one lucky batch is not enough


def test_the_step_reduction_is_how_many_times_faster_the_baselines_final_loss_is_reached():
    steps = np.arange(1, 1001)

    def halving(every):
        return np.exp2(-steps / every)

    baseline = halving(200)
    assert step_reduction(baseline, baseline) == 1
    fast = step_reduction(halving(50), baseline)
    # Four times as fast, but for the running mean's width.
    assert 3.5 < fast <= 4.0
    assert fast == 1000 / steps_to_reach(halving(50), running_mean(baseline)[-1])
    assert step_reduction(halving(201), baseline) is None
    # A baseline that is there early and stays: it is counted from there.
    flat = np.maximum(halving(20), 0.125)
    assert 0.25 < step_reduction(halving(40), flat) < 0.75


def test_the_best_rate_has_the_lowest_loss_and_not_diverged():
    fast, slow = np.full(STEPS, 0.1), np.full(STEPS, 0.2)
    broken = np.where(np.arange(STEPS) < STEPS - 1, 0.01, np.nan)
    losses = {
        1e-3: tuning_loss([result(slow), result(slow)]),
        1e-2: tuning_loss([result(fast), result(slow)]),
        1e-1: tuning_loss([result(broken), result(np.zeros(STEPS))]),
    }
    assert losses == pytest.approx({1e-3: 0.2, 1e-2: 0.15, 1e-1: np.inf})
    assert best_rate(losses) == 1e-2
    assert best_rate({3.0: np.inf, 2.0: np.inf}) == 2.0


def test_final_losses_and_divergence():
    losses = np.concatenate([np.full(STEPS, 5.0), np.full(LAST_STEPS, 1.5)])
    assert final_loss(result(losses)) == 1.5
    assert not has_diverged(result(losses))  # it came back
    assert has_diverged(result(losses, first=1.4 / DIVERGED_ABOVE))
    assert has_diverged(result(np.where(losses < 2, np.inf, losses)))
    assert has_diverged(result(np.full(STEPS, np.nan)))


# -- costs ------------------------------------------------------------------------------------------------------------


def test_costs_of_adam():
    trainer = make_trainer(hand_made("adam"), quadratic.TASK, "cosine", STEPS)
    cost = update_cost(trainer, {}, quadratic.points())
    assert cost.state_bytes == 2 * 2 * 4 + 2 * 4  # two moments of two parameters, and the steps, counted twice
    assert cost.milliseconds > 0
    assert cost.temporary_bytes is None or cost.temporary_bytes >= 0
    assert gradient_milliseconds(quadratic.TASK, quadratic.points()) > 0


@dataclasses.dataclass
class Counter:
    calls: int = 0

    def __call__(self):
        self.calls += 1
        return jnp.zeros(())


def test_calls_are_repeated_for_a_time_and_within_bounds():
    counter = Counter()
    assert median_milliseconds(counter, seconds=0.0, least=3) >= 0
    assert counter.calls == 2 + 3
    counter = Counter()
    median_milliseconds(counter, seconds=100.0, most=7, least=1)
    assert counter.calls == 2 + 7


def test_versions_tell_rules_names_and_shapes_apart():
    theta, facts = {"a": np.ones(2, np.float32), "b": np.zeros(2, np.float32)}, {"rule": "ff", "step": "paper"}
    version = fingerprint(MetaFile(theta, facts))
    assert fingerprint(MetaFile(theta, {**facts, "rule": "lstm"})) != version
    assert fingerprint(MetaFile({"a": theta["a"], "c": theta["b"]}, facts)) != version
    assert fingerprint(MetaFile({**theta, "b": theta["b"].reshape(1, 2)}, facts)) != version
