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
