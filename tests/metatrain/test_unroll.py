import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngjax.metatrain.optimizers import LearnedOptimizer
from ngjax.metatrain.tasks import find_task, rescale, sample_batch
from ngjax.metatrain.unroll import (
    LARGEST_LOSS,
    LOSS_FLOOR,
    RunSettings,
    Trainer,
    finite_or_zero,
    is_over,
    meta_loss,
    no_run,
    start_run,
    unroll,
    unroll_with_gradient,
    warmup_cosine,
)
from ngjax.optimizers import FFRule, init_meta_params
from tests.metatrain import quadratic
from tests.optimizers.small import RULES, assert_close, meta_params, normal, run

TRAINER = Trainer(quadratic.TASK, quadratic.scheduled, RunSettings((6, 12), (0.1, 1.0)))


def test_the_rate_rises_to_its_peak_and_falls_to_zero_but_is_never_zero():
    rates = np.array([warmup_cosine(jnp.float32(0.2), jnp.int32(100), 0.1, jnp.int32(c)) for c in range(101)])
    assert rates[:100].min() > 0
    assert rates.argmax() in (9, 10)
    assert 0.195 < rates.max() <= 0.2
    assert np.all(np.diff(rates[:10]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)
    assert rates[100] < 1e-6


def test_a_run_of_one_step_has_a_rate():
    assert warmup_cosine(jnp.float32(0.2), jnp.int32(1), 0.05, jnp.int32(0)) > 0.05


def test_meta_loss_of_runs_that_diverge_is_bounded_and_flat():
    losses = jnp.array([1.0, LARGEST_LOSS, 1e30, jnp.inf, jnp.nan])
    np.testing.assert_allclose(meta_loss(losses), np.log(np.array([1.0] + 4 * [LARGEST_LOSS]) + LOSS_FLOOR), rtol=1e-6)
    slopes = jax.vmap(jax.grad(meta_loss))(losses)
    np.testing.assert_allclose(slopes, [1 / (1 + LOSS_FLOOR), 0, 0, 0, 0])


def test_a_tree_with_a_number_that_is_not_finite_becomes_zero():
    tree = {"a": jnp.ones(2), "b": jnp.array([1.0, jnp.nan])}
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(finite_or_zero(tree)))
    assert finite_or_zero({"a": jnp.ones(2)})["a"].tolist() == [1, 1]


def test_runs_differ_in_horizon_and_rate_and_scales_but_not_in_what_their_networks_are():
    keys = jax.random.split(jax.random.key(0), 200)
    runs = jax.jit(jax.vmap(lambda key: start_run(TRAINER, quadratic.theta(), key, quadratic.points())))(keys)
    assert set(runs.horizon.tolist()) == {6, 12}
    assert 0.1 <= runs.peak.min() < 0.12
    assert 0.85 < runs.peak.max() <= 1.0
    assert np.isclose(np.median(runs.peak), 0.316, rtol=0.3)
    assert 0.1 <= runs.scales["p"].min() < 0.2
    assert 5 < runs.scales["p"].max() <= 10
    networks = jax.vmap(rescale)(runs.scales, runs.params)
    assert np.isclose(np.mean(networks["p"]), 2, atol=0.3)
    plain = dataclasses.replace(TRAINER, settings=dataclasses.replace(TRAINER.settings, scale_spread=1.0))
    run = jax.jit(lambda key: start_run(plain, quadratic.theta(), key, quadratic.points()))(keys[0])
    np.testing.assert_allclose(run.params["p"], networks["p"][0], rtol=1e-6)


def test_a_run_is_over_at_its_horizon_or_when_it_diverges():
    run = jax.jit(lambda key: start_run(TRAINER, quadratic.theta(), key, quadratic.points()))(jax.random.key(0))
    assert not is_over(run)
    assert is_over(run._replace(count=run.horizon))
    assert is_over(run._replace(loss=jnp.float32(jnp.nan)))
    assert is_over(run._replace(loss=jnp.float32(2 * LARGEST_LOSS)))
    none = no_run(TRAINER, quadratic.theta(), jax.random.key(0), quadratic.points())
    assert is_over(none)
    assert jax.tree.structure(none) == jax.tree.structure(run)
    assert [leaf.dtype for leaf in jax.tree.leaves(none)] == [leaf.dtype for leaf in jax.tree.leaves(run)]


def by_hand(trainer, theta, run, data, length, credit_decay):
    """Parameters, losses, and the gradient of the mean loss where what the optimizer reads is constant."""

    def mean_loss(theta):
        optimizer = trainer.optimizer(theta, run.peak, run.horizon)
        params, opt_state, gradient = run.params, run.opt_state, run.gradient
        varied, losses = jax.tree.map(jnp.zeros_like, params), []  # zero, with the derivatives of the steps so far
        for step in range(length):
            batch = sample_batch(jax.random.fold_in(run.key, step), data.train, trainer.task.batch_size)

            def loss_at(q, batch=batch):
                return trainer.task.loss(rescale(run.scales, q), batch)

            updates, new_state = optimizer.update(gradient, opt_state, params)
            constant, opt_state = jax.lax.stop_gradient((updates, new_state))
            varied = jax.tree.map(lambda v, u, c: credit_decay * v + u - c, varied, updates, constant)
            params = optax.apply_updates(params, constant)
            losses.append(loss_at(optax.apply_updates(params, varied)))
            gradient = jax.grad(loss_at)(params)
        losses = jnp.stack(losses)
        return jnp.mean(jnp.log(losses + LOSS_FLOOR)), (params, losses)

    gradient, (params, losses) = jax.grad(mean_loss, has_aux=True)(theta)
    return params, losses, gradient


def check_against_a_loop(trainer, theta, data, length, credit_decay):
    @jax.jit
    def both(theta, data):
        run = start_run(trainer, theta, jax.random.key(3), data)
        arguments = trainer, theta, run, data, length, credit_decay
        return unroll_with_gradient(*arguments), by_hand(*arguments)

    (run, losses, gradient), (params, expected_losses, expected) = both(theta, data)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), run.params, params)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert scale > 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * scale), gradient, expected)
    assert run.count == length


@pytest.mark.parametrize("credit_decay", [0.0, 0.5, 1.0])
def test_gradients_are_those_of_losses_on_fresh_batches(credit_decay):
    check_against_a_loop(TRAINER, quadratic.theta(0.0), quadratic.points(), 5, credit_decay)


def test_gradients_of_a_learned_optimizer():
    rule = FFRule(width=4, num_hidden=1)
    trainer = Trainer(quadratic.TASK, LearnedOptimizer(rule), RunSettings((10,), (0.1, 0.2)))
    check_against_a_loop(trainer, init_meta_params(jax.random.key(0), rule), quadratic.points(), 2, 1.0)


def test_an_unroll_without_gradients_is_the_same():
    @jax.jit
    def both(theta, data):
        run = start_run(TRAINER, theta, jax.random.key(3), data)
        return unroll_with_gradient(TRAINER, theta, run, data, 5, 1.0)[:2], unroll(TRAINER, theta, run, data, 5)

    with_gradient, without = both(quadratic.theta(0.0), quadratic.points())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        (with_gradient[0]._replace(key=0), with_gradient[1]),
        (without[0]._replace(key=0), without[1]),
    )


def test_of_a_run_that_diverges_the_steps_before_count():
    trainer = dataclasses.replace(TRAINER, settings=RunSettings((100,), (1e3, 1e3)))
    data = quadratic.points()

    @functools.partial(jax.jit, static_argnums=1)
    def diverging(theta, length):
        run = start_run(trainer, theta, jax.random.key(0), data)
        return unroll_with_gradient(trainer, theta, run, data, length, 1.0)

    run, losses, gradient = diverging(quadratic.theta(0.0), 40)
    assert not np.all(np.isfinite(losses))
    assert not np.all(np.isfinite(run.gradient["p"]))
    assert losses[2] > LARGEST_LOSS
    assert np.all(np.isfinite(jax.tree.leaves(gradient)))
    _, _, of_first = diverging(quadratic.theta(0.0), 3)
    assert np.any(np.array(jax.tree.leaves(of_first)) != 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(40 * a, 3 * b, rtol=1e-5), gradient, of_first)
    assert is_over(run)


@pytest.mark.parametrize("step", ["normalized", "paper"])
def test_the_rate_of_a_run_plays_a_part_in_normalized_steps_alone(step):
    def update(rate):
        make = LearnedOptimizer(RULES["ff"], step)
        optimizer = make(meta_params("ff"), quadratic.TASK, lambda count: rate * jnp.ones_like(count, jnp.float32))
        return run(optimizer, normal(0), [normal(1)])[0]

    factor = np.float32(0.5 if step == "normalized" else 1)
    assert_close(update(0.5), jax.tree.map(lambda leaf: factor * leaf, update(1.0)))


def test_graphs_are_those_of_the_task():
    optimizer = LearnedOptimizer(RULES["ng-gnn"])(
        meta_params("ng-gnn"), find_task("digits-mlp-4-relu"), lambda count: 0.1
    )
    with pytest.raises(ValueError, match=r"layer_0/bias: the spec expects shape \(4,\), received \(8,\)"):
        optimizer.init(normal(0))


def test_chunks_are_passed_on():
    with pytest.raises(ValueError, match="chunk: expected a number of scalars of at least 1, received 0"):
        LearnedOptimizer(RULES["ff"], chunk=0)(meta_params("ff"), quadratic.TASK, lambda count: 0.1)
