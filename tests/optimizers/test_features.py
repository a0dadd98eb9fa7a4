import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngjax.optimizers import features


@pytest.mark.parametrize("size", [1e-30, 1e-12, 4.5e-5, 4.6e-5, 1e-3, 1.0, 1e8, 1e30, 1e34])
def test_log_sign_against_the_formula(size):
    x = np.float32(size)
    for sign in (-1, 1):
        expected = (np.log(x) / 10, sign) if x >= np.exp(-10) else (-1, sign * np.exp(10) * x)
        np.testing.assert_allclose(features.log_sign(jnp.array([sign * x])), expected, rtol=1e-6)


def test_log_sign_is_continuous_where_its_branches_meet_and_odd_in_the_second_number():
    edge = np.float32(np.exp(-10))
    around = jnp.array([[np.nextafter(edge, np.float32(0))], [np.nextafter(edge, np.float32(1))]])
    np.testing.assert_allclose(features.log_sign(around), [[-1, 1], [-1, 1]], rtol=1e-5)
    np.testing.assert_array_equal(features.log_sign(jnp.zeros(1)), [-1, 0])


def test_derivatives_are_finite_everywhere():
    x = jnp.array([0.0, 1e-30, -1e-5, 1e-3, -1.0, 1e30])
    slopes = jax.jit(jax.grad(lambda x: jnp.sum(features.log_sign(x))))(x)
    assert np.all(np.isfinite(slopes))


def test_features_are_interleaved_by_value_gradient_and_momenta():
    momenta = [jnp.full(3, 10.0**k, jnp.float32) for k in range(5)]
    x = features.scalar_features(jnp.full(3, -np.e, jnp.float32), jnp.zeros(3, jnp.bfloat16), momenta)
    assert (x.shape, x.dtype) == ((3, features.NUM_FEATURES), jnp.float32)
    scale = np.log(10) / 10
    expected = [0.1, -1, -1, 0, *(number for k in range(5) for number in (k * scale, 1))]
    np.testing.assert_allclose(x, [expected] * 3, rtol=1e-6)


def test_momenta_are_sums_without_correction():
    momenta = 5 * (jnp.zeros(2, jnp.float32),)
    for _ in range(3):
        momenta = features.update_momenta(momenta, jnp.ones(2, jnp.bfloat16))
    for decay, momentum in zip(features.MOMENTUM_DECAYS, momenta, strict=True):
        assert momentum.dtype == jnp.float32
        np.testing.assert_allclose(momentum, 1 + decay + decay**2, rtol=1e-6)


@jax.jit
def normalized(value, moving):
    return features.normalized_features(value, moving[0], moving[1:])


def numbers(shape):
    """A parameter, and its gradient and momenta."""
    value, *moving = np.random.default_rng(0).standard_normal((7, *shape)).astype(np.float32)
    return value, moving


def test_normalized_features_by_hand():
    value, moving = numbers((3, 4))
    x = normalized(value, moving)
    assert (x.shape, x.dtype) == ((3, 4, features.NUM_NORMALIZED), jnp.float32)
    relative = np.stack([n / np.sqrt(np.mean(n**2)) for n in (value, *moving)], axis=-1)
    np.testing.assert_allclose(x[..., :7], relative, rtol=1e-5)
    over_time = np.sqrt(np.mean(relative[..., 1:] ** 2, axis=-1, keepdims=True))
    np.testing.assert_allclose(x[..., 7:13], relative[..., 1:] / over_time, rtol=1e-5)
    for k, n in zip(range(13, 17), (moving[0], *moving[2:5]), strict=True):  # gradient; 0.9, 0.99 and 0.999
        squares = np.mean(n**2, axis=1, keepdims=True) * np.mean(n**2, axis=0) / np.mean(n**2)
        np.testing.assert_allclose(x[..., k], n / np.sqrt(squares), rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_normalized_features_have_no_scale(shape):
    value, moving = numbers(shape)
    expected = normalized(value, moving)
    for of_gradient, of_value in ((1e-30, 1), (1e30, 1e30), (1, 1e-20)):
        ours = normalized(np.float32(of_value) * value, [np.float32(of_gradient) * m for m in moving])
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_normalized_features_do_not_depend_on_the_order_of_axes():
    value, moving = numbers((2, 3, 4))
    turned = normalized(np.transpose(value, (2, 0, 1)), [np.transpose(m, (2, 0, 1)) for m in moving])
    expected = np.transpose(normalized(value, moving), (2, 0, 1, 3))
    np.testing.assert_allclose(turned, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (0, 3), (200,), (3, 4)])
def test_normalized_features_and_their_derivatives_are_finite_and_bounded(shape):
    @jax.jit
    def run(x):
        def total(x):
            result = normalized(x, 6 * [x])
            return jnp.sum(result), result

        return jax.grad(total, has_aux=True)(x)

    for size in (0.0, 1e-45, 1e-39, 1e-30, 1.0, 1e34):
        x = np.zeros(shape, np.float32)
        x[(slice(1),) if shape else ...] = size  # other rows without a gradient
        slopes, result = run(x)
        assert np.all(np.isfinite(slopes))
        assert np.all(np.abs(result) <= features.LARGEST_NORMALIZED)
        assert size > 0 or np.all(result == 0)


def test_what_had_a_gradient_is_known_while_any_momentum_remembers():
    for number in range(5):
        momenta = [jnp.array([1e-30 * (k == number), 0], jnp.float32) for k in range(5)]
        assert features.had_gradient(momenta).tolist() == [True, False]


def test_no_normalized_feature_is_above_ten():
    x = np.zeros(200, np.float32)
    x[0] = 1  # fourteen times the root mean square
    assert np.max(normalized(x, 6 * [x])) == 10


def test_rows_of_small_numbers_are_brought_to_the_size_of_others():
    value, moving = numbers((3, 4))
    moving[0][1:] *= np.float32(1e-2)
    squares = np.mean(moving[0] ** 2, axis=1, keepdims=True) * np.mean(moving[0] ** 2, axis=0) / np.mean(moving[0] ** 2)
    expected = np.clip(moving[0] / np.sqrt(squares), -10, 10)
    np.testing.assert_allclose(normalized(value, moving)[..., 13], expected, rtol=1e-4)
