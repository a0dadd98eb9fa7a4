import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngjax.metatrain.estimators import PES, OneStep, PaperScheme, Stream, epoch_rows_from, fresh_pair, run_metrics
from ngjax.metatrain.tasks import Batch
from ngjax.metatrain.unroll import LARGEST_LOSS, RunSettings, Trainer, meta_loss, start_run, unroll
from tests.metatrain import quadratic

TRAINER = Trainer(quadratic.TASK, quadratic.momentum, RunSettings((6, 12), (0.1, 1.0), scale_spread=1.0))
DATA = quadratic.points()


@jax.jit
def long_run(theta):
    return start_run(TRAINER, theta, jax.random.key(1), DATA)._replace(horizon=jnp.int32(100))


def test_one_step_goes_on_until_the_horizon_and_then_starts_anew():
    estimator, theta = OneStep(truncation=6), quadratic.theta()
    estimate = jax.jit(functools.partial(estimator.estimate, TRAINER))
    member = estimator.start(TRAINER, theta, jax.random.key(0), DATA)
    seen = []
    for step in range(12):
        member, gradient, metrics = estimate(theta, member, jax.random.key(step), DATA)
        seen.append((int(member.count), int(member.horizon)))
        assert np.isfinite(metrics["loss"])
        np.testing.assert_allclose(optax.tree.norm(gradient), 1, rtol=1e-5)
    assert set(seen) == {(6, 6), (6, 12), (12, 12)}
    for before, after in itertools.pairwise(seen):
        assert after == (12, 12) if before == (6, 12) else after[0] == 6


@pytest.mark.parametrize("estimator", [OneStep(truncation=4), PES(truncation=4)])
@pytest.mark.parametrize("horizons", [(6, 12), (8, 6), (6, 8)])
def test_runs_that_end_within_a_truncation_are_refused(estimator, horizons):
    trainer = dataclasses.replace(TRAINER, settings=RunSettings(horizons))
    with pytest.raises(ValueError, match=re.escape(f"horizons={horizons}: expected multiples of truncation=4")):
        estimator.start(trainer, quadratic.theta(), jax.random.key(0), DATA)


@pytest.mark.parametrize("credit_decay", [-0.1, 1.5, float("nan")])
def test_a_credit_decay_that_is_no_share_is_refused(credit_decay):
    with pytest.raises(ValueError, match="credit_decay: expected 0 to 1, received"):
        OneStep(credit_decay=credit_decay)


def test_pes_is_the_gradient_through_the_whole_run():
    """In the mean over many perturbations, and summed over the truncations; a truncated gradient is another."""
    theta, length, members = quadratic.theta(-2.5, 0.5), 5, 2**15
    run = long_run(theta)
    estimator = PES(truncation=length, deviation=0.03)

    def two_truncations(noise_key):
        member, total = fresh_pair(theta, run), jax.tree.map(jnp.zeros_like, theta)
        for key in jax.random.split(noise_key):
            member, gradient, _ = estimator.estimate(TRAINER, theta, member, key, DATA)
            total = jax.tree.map(jnp.add, total, gradient)
        return total

    drawn = jax.jit(jax.vmap(two_truncations))(jax.random.split(jax.random.key(2), members))

    def whole(theta, cut):
        first, losses = unroll(TRAINER, theta, run, DATA, length)
        first = jax.lax.stop_gradient(first) if cut else first
        _, more = unroll(TRAINER, theta, first, DATA, length)
        return jnp.mean(meta_loss(losses)) + jnp.mean(meta_loss(more))

    exact, truncated = (jax.jit(jax.grad(functools.partial(whole, cut=cut)))(theta) for cut in (False, True))
    for name in theta:
        error = np.std(drawn[name]) / np.sqrt(members)
        assert abs(np.mean(drawn[name]) - exact[name]) < 4 * error
        assert abs(truncated[name] - exact[name]) > 8 * error


def test_pes_by_hand():
    """One truncation after another, with the numbers of the definition."""
    theta, length, deviation = quadratic.theta(), 4, 0.1
    estimator = PES(length, deviation)
    run = long_run(theta)
    member = fresh_pair(theta, run)
    plus = minus = run
    total = jax.tree.map(jnp.zeros_like, theta)
    estimate = jax.jit(functools.partial(estimator.estimate, TRAINER))
    unroll_by = jax.jit(lambda theta, run: unroll(TRAINER, theta, run, DATA, length))
    for step in range(3):
        before = member.noise
        member, gradient, metrics = estimate(theta, member, jax.random.key(step), DATA)
        noise = jax.tree.map(jnp.subtract, member.noise, before)
        assert 0 < abs(noise["decay"]) < 5 * deviation
        total = jax.tree.map(jnp.add, total, noise)
        plus, losses = unroll_by(jax.tree.map(jnp.add, theta, noise), plus)
        minus, other = unroll_by(jax.tree.map(jnp.subtract, theta, noise), minus)
        difference = jnp.mean(meta_loss(losses)) - jnp.mean(meta_loss(other))
        for name in theta:
            np.testing.assert_allclose(
                gradient[name], total[name] * difference / (2 * deviation**2), rtol=1e-3, atol=1e-4
            )
        np.testing.assert_allclose(metrics["loss"], np.mean(meta_loss(jnp.stack([losses, other]))), rtol=1e-5)


def test_pes_starts_anew_without_noise():
    estimator, theta = PES(6, 0.1), quadratic.theta()
    estimate = jax.jit(functools.partial(estimator.estimate, TRAINER))
    member = estimator.start(TRAINER, theta, jax.random.key(0), DATA)
    sizes = {6: [], 12: []}
    for step in range(60):
        member = estimate(theta, member, jax.random.key(step), DATA).member
        assert member.runs.count[0] == member.runs.count[1]
        sizes[int(member.runs.count[0])].append(float(member.noise["decay"]))
    assert 0.07 < np.std(sizes[6]) < 0.13
    assert 0.09 < np.std(sizes[12]) < 0.2
    assert member.runs.params["p"][0].tolist() != member.runs.params["p"][1].tolist()


def test_the_papers_scheme_by_hand():
    """The same batch before and after each step, gradients through single steps, summed; data go on."""
    estimator, theta = PaperScheme(inner_steps=5), quadratic.theta()
    member = estimator.start(TRAINER, theta, jax.random.key(0), DATA)
    rows = epoch_rows_from(member, 32, 4, 10)
    estimate = jax.jit(functools.partial(estimator.estimate, TRAINER))
    for number in range(2):
        key = jax.random.key(number)
        member, gradient, metrics = estimate(theta, member, key, DATA)
        losses, expected = papers_scheme(theta, quadratic.TASK.init(key), rows[5 * number : 5 * number + 5])
        for name in theta:
            np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-4)
        np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
        np.testing.assert_allclose(metrics["last_loss"], losses[-1], rtol=1e-5)


@jax.jit
def papers_scheme(theta, params, rows):
    opt_state = quadratic.momentum(theta, None, None).init(params)
    slopes, losses = [], []
    for chosen in rows:
        batch = Batch(DATA.train.inputs[chosen], DATA.train.labels[chosen])
        gradient = jax.grad(quadratic.TASK.loss)(params, batch)

        def loss_after(theta, gradient=gradient, opt_state=opt_state, params=params, batch=batch):
            updates, state = quadratic.momentum(theta, None, None).update(gradient, opt_state, params)
            after = optax.apply_updates(params, updates)
            return quadratic.TASK.loss(after, batch), (after, state)

        (loss, (params, opt_state)), slope = jax.value_and_grad(loss_after, has_aux=True)(theta)
        losses.append(loss)
        slopes.append(slope)
    return losses, jax.tree.map(lambda *leaves: sum(leaves), *slopes)


def test_passes_over_the_data_go_on():
    key = jax.random.key(0)
    whole = np.asarray(epoch_rows_from(Stream(key, jnp.int32(0)), 22, 5, 12))
    parts = [epoch_rows_from(Stream(key, jnp.int32(first)), 22, 5, 3) for first in (0, 3, 6, 9)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    for number in range(3):
        seen = whole[4 * number : 4 * number + 4].ravel()
        assert len(set(seen.tolist())) == 20
    assert whole[:4].tolist() != whole[4:8].tolist()


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size: expected 1 to 3, the number of rows; received 5"):
        epoch_rows_from(Stream(jax.random.key(0), jnp.int32(0)), 3, 5, 1)


def test_a_pair_of_which_one_has_diverged_starts_anew():
    estimator, theta = PES(6, 0.1), quadratic.theta()
    member = estimator.start(TRAINER, theta, jax.random.key(0), DATA)
    runs = jax.vmap(lambda _: long_run(theta))(jnp.arange(2))
    lost = runs._replace(loss=jnp.array([jnp.nan, 1.0]), count=jnp.array([18, 18]))
    estimate = jax.jit(functools.partial(estimator.estimate, TRAINER))
    member = estimate(theta, member._replace(runs=lost), jax.random.key(1), DATA).member
    assert member.runs.count.tolist() == [6, 6]


def test_a_run_that_teaches_nothing_has_a_gradient_of_zero():
    trainer = dataclasses.replace(TRAINER, make_optimizer=lambda theta, *_: optax.sgd(0.1))
    theta = quadratic.theta()
    run = start_run(trainer, theta, jax.random.key(1), DATA)
    gradient = OneStep(6).estimate(trainer, theta, run, jax.random.key(0), DATA).gradient
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))  # and no NaN


def test_gradients_of_runs_may_keep_their_norms():
    theta = quadratic.theta()
    of_runs = [
        OneStep(6, equal_runs=equal).estimate(TRAINER, theta, long_run(theta), jax.random.key(0), DATA).gradient
        for equal in (True, False)
    ]
    norm = optax.tree.norm(of_runs[1])
    assert abs(norm - 1) > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a * norm, b, rtol=1e-5), *of_runs)


def test_runs_above_the_largest_loss_or_at_no_number_have_diverged():
    losses = jnp.array([[1.0, 1.0], [1.0, jnp.nan], [1.0, jnp.inf], [1.0, 2 * LARGEST_LOSS]])
    assert run_metrics(losses)["diverged"] == 0.75
