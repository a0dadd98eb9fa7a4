import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngjax import train


def test_warmup_is_k_over_w_then_constant():
    schedule = train.learning_rate_schedule(0.01, warmup_steps=8)
    rates = np.array([schedule(k - 1) for k in range(1, 13)])
    expected = np.float32(0.01) * np.minimum(np.arange(1, 13) / 8, 1).astype(np.float32)
    np.testing.assert_array_equal(rates, expected)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_no_warmup(warmup_steps):
    schedule = train.learning_rate_schedule(0.5, warmup_steps=warmup_steps)
    assert [float(schedule(count)) for count in range(4)] == [0.5] * 4


def test_cosine_starts_at_the_peak_and_reaches_zero():
    schedule = train.learning_rate_schedule(2.0, warmup_steps=4, total_steps=12)
    rates = [float(schedule(count)) for count in range(14)]
    np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
    np.testing.assert_allclose(rates[8], 1.0, rtol=1e-6)
    np.testing.assert_allclose(rates[12:], 0.0, atol=1e-6)
    assert all(np.diff(rates[4:13]) < 0)


def test_cosine_needs_steps_after_warmup():
    with pytest.raises(ValueError, match=r"total_steps=10 .* warmup_steps=10"):
        train.learning_rate_schedule(1.0, warmup_steps=10, total_steps=10)


def adamw_of_the_reference(params, grads, *, rates, weight_decay, clip_norm, amsgrad):
    """PyTorch's AdamW after `clip_grad_norm_`, in float64."""
    mean = square = largest = np.zeros_like(params)
    for k, (grad, rate) in enumerate(zip(grads, rates, strict=True), 1):
        grad = grad * min(1.0, clip_norm / np.linalg.norm(grad))
        mean = 0.9 * mean + 0.1 * grad
        square = 0.999 * square + 0.001 * grad**2
        largest = np.maximum(largest, square)
        divisor = np.sqrt((largest if amsgrad else square) / (1 - 0.999**k)) + 1e-8
        params = params * (1 - rate * weight_decay)
        params = params - rate * mean / (1 - 0.9**k) / divisor
    return params


@pytest.mark.parametrize("amsgrad", [True, False])
def test_optimizer_is_that_of_the_reference(amsgrad):
    """A first gradient large enough to be clipped and to dominate AMSGrad, then small ones."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(30, 5)) * np.array([300.0] + 29 * [0.1])[:, None]
    start = rng.normal(size=5)
    adamw = functools.partial(
        adamw_of_the_reference,
        start,
        grads,
        rates=[0.05] + 29 * [0.1],
        weight_decay=0.3,
        clip_norm=10.0,
    )
    expected = adamw(amsgrad=amsgrad)
    # The other variant, or forgetting to clip or to decay, is told apart.
    assert np.max(np.abs(expected - adamw(amsgrad=not amsgrad))) > 1e-3
    assert np.max(np.abs(expected - adamw(amsgrad=amsgrad, clip_norm=np.inf))) > 1e-3
    assert np.max(np.abs(expected - adamw(amsgrad=amsgrad, weight_decay=0.0))) > 1e-3

    optimizer = train.make_optimizer(0.1, weight_decay=0.3, warmup_steps=2, amsgrad=amsgrad)
    params = jnp.asarray(start, jnp.float32)
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(optimizer.update)
        for grad in grads:
            updates, state = update(jnp.asarray(grad, jnp.float32), state, params)
            params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, expected, rtol=0, atol=2e-5)


def squares(params, batch, key):
    del batch
    return jnp.sum(params**2), {"draw": jax.random.uniform(key)}


def test_step_reports_loss_and_norm_of_the_parameters_before_it():
    optimizer = optax.sgd(0.25)
    state = train.init_state(jnp.array([3.0, 4.0]), optimizer)
    state, metrics = train.train_step(state, None, jax.random.key(0), loss_fn=squares, optimizer=optimizer)
    assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (25.0, 10.0)
    np.testing.assert_array_equal(state.params, [1.5, 2.0])
    assert int(state.step) == 1


def test_each_step_has_its_own_key():
    optimizer = optax.sgd(0.25)
    state = train.init_state(jnp.ones(2), optimizer)
    key = jax.random.key(7)
    for step in range(3):
        state, metrics = train.train_step(state, None, key, loss_fn=squares, optimizer=optimizer)
        assert metrics["draw"] == jax.random.uniform(jax.random.fold_in(key, step))


def test_optimizer_receives_the_loss():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(float(value))
        return updates, state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state = train.init_state(jnp.array([3.0, 4.0]), optimizer)
    train.train_step(state, None, jax.random.key(0), loss_fn=squares, optimizer=optimizer)
    assert seen == [25.0]


@pytest.mark.parametrize(
    ("named", "message"),
    [({"grad_norm": jnp.zeros(())}, "'grad_norm'"), ({"each": jnp.zeros(3)}, r"'each'.*\(3,\)")],
    ids=["reserved", "no scalar"],
)
def test_bad_metrics(named, message):
    optimizer = optax.sgd(0.25)
    state = train.init_state(jnp.ones(2), optimizer)
    with pytest.raises(ValueError, match=message):
        train.train_step(
            state,
            None,
            jax.random.key(0),
            loss_fn=lambda params, batch, key: (jnp.sum(params), named),
            optimizer=optimizer,
        )


def weighted(params, batch, key):
    """A mean over rows, with a number drawn for each piece."""
    errors = jnp.tanh(batch["x"] @ params - batch["y"])
    return jnp.mean(errors**2), {"largest": jnp.max(batch["y"]), "draw": jax.random.uniform(key)}


@pytest.mark.parametrize(("devices", "rows"), [(1, 1), (1, 8), (2, 2), (4, 1), (8, 2)])
def test_micro_batches_add_up_to_the_batch(devices, rows):
    batch = {"x": jax.random.normal(jax.random.key(0), (16, 3)), "y": jnp.arange(16) / 10}
    params, key = jnp.array([0.5, -1.0, 2.0]), jax.random.key(1)
    mesh = train.data_mesh(jax.devices()[:devices])
    value_and_grad = jax.jit(train.micro_batch_gradients(weighted, mesh, rows))
    (loss, metrics), gradient = value_and_grad(
        train.replicate(params, mesh), train.shard_batch(batch, mesh), train.replicate(key, mesh)
    )
    (expected_loss, _), expected = jax.value_and_grad(weighted, has_aux=True)(params, batch, key)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    # Metrics are means over the pieces, and each piece has a key of its own, the same on any number of devices.
    pieces = batch["y"].reshape(-1, rows).max(axis=1)
    draws = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(16 // rows)]
    np.testing.assert_allclose(metrics["largest"], pieces.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["draw"], np.mean(draws), rtol=1e-6)


def test_micro_batches_that_do_not_fit_are_refused():
    mesh = train.data_mesh(jax.devices()[:2])
    batch = train.shard_batch({"x": np.ones((12, 3), np.float32), "y": np.ones(12, np.float32)}, mesh)
    with pytest.raises(ValueError, match="every device has 6 rows of the batch.*micro_batch=4"):
        train.micro_batch_gradients(weighted, mesh, 4)(jnp.ones(3), batch, jax.random.key(0))
    state = train.init_state(jnp.ones(3), optax.sgd(1.0))
    with pytest.raises(ValueError, match="micro_batch=2 needs the mesh"):
        train.train_step(state, batch, jax.random.key(0), loss_fn=weighted, optimizer=optax.sgd(1.0), micro_batch=2)
