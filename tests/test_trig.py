"""`sincos` against float64 numpy, its derivatives against the analytic ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ngjax.trig import LARGEST_ARGUMENT, sincos


def _errors(x, function=None):
    """Largest absolute errors of sine and cosine over the float32 array `x`."""
    sin, cos = (function or jax.jit(sincos))(jnp.asarray(x))
    exact = np.asarray(x, np.float64)
    return np.abs(sin - np.sin(exact)).max(), np.abs(cos - np.cos(exact)).max()


@pytest.mark.parametrize(("largest", "bound"), [(1.0, 1.0e-7), (100.0, 1.3e-7), (1e4, 1.5e-7), (1e5, 1.5e-7)])
def test_accuracy_on_dense_grids(largest, bound):
    x = np.linspace(-largest, largest, 1_000_003, dtype=np.float32)
    assert max(_errors(x)) < bound


def test_accuracy_survives_the_compiler():
    """Scaled, shifted and summed arguments tempt the compiler to fold constants into the reduction."""
    z = np.linspace(-3.0, 3.0, 200_003, dtype=np.float32)

    @jax.jit
    def fused(z, shift):
        x = 30.0 * z + shift
        sin, cos = sincos(x)
        return x, 2.0 * sin + 1.0, 2.0 * cos - 1.0

    x, sin, cos = fused(jnp.asarray(z), jnp.float32(1.0))
    # `x` itself may be rounded differently inside and outside of the fusion, by 100 / 2**24.
    np.testing.assert_allclose(sin, 2 * np.sin(np.float64(x)) + 1, atol=2e-5)
    np.testing.assert_allclose(cos, 2 * np.cos(np.float64(x)) - 1, atol=2e-5)


def test_near_every_multiple_of_half_pi():
    """The reduction is most delicate where sine or cosine vanish, and where the multiple switches."""
    centres = (np.arange(-600, 601) * np.pi / 2).astype(np.float32)
    x = np.concatenate([centres, np.nextafter(centres, np.inf), np.nextafter(centres, -np.inf)])
    assert max(_errors(x.astype(np.float32))) < 1.3e-7


def test_jit_and_eager_agree():
    x = jnp.linspace(-50.0, 50.0, 10_001)
    for eager, compiled in zip(sincos(x), jax.jit(sincos)(x), strict=True):
        np.testing.assert_allclose(eager, compiled, atol=2.5e-7)


def test_values_that_are_not_finite_give_nan():
    for value in jax.jit(sincos)(jnp.array([jnp.nan, jnp.inf, -jnp.inf])):
        assert np.isnan(value).all()


def test_large_arguments_stay_bounded():
    x = jnp.array([2.0**19, -(2.0**21), 1e10, -1e30, 3e38], jnp.float32)
    sin, cos = jax.jit(sincos)(x)
    np.testing.assert_allclose(sin**2 + cos**2, 1.0, atol=1e-5)
    cut = np.clip(np.float64(x), -LARGEST_ARGUMENT, LARGEST_ARGUMENT)
    np.testing.assert_allclose(sin, np.sin(cut), atol=1e-3)
    np.testing.assert_allclose(cos, np.cos(cut), atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_other_dtypes_use_the_usual_functions(dtype):
    x = jnp.linspace(-4.0, 4.0, 33, dtype=dtype)
    sin, cos = sincos(x)
    assert sin.dtype == cos.dtype == dtype
    np.testing.assert_array_equal(sin, jnp.sin(x))
    np.testing.assert_array_equal(cos, jnp.cos(x))


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4)])
def test_shapes(shape):
    sin, cos = sincos(jnp.zeros(shape))
    assert sin.shape == cos.shape == shape
    np.testing.assert_array_equal(sin, 0.0)
    np.testing.assert_array_equal(cos, 1.0)


def test_first_derivatives():
    x = jnp.linspace(-20.0, 20.0, 1001)
    sin_gradient = jax.grad(lambda x: sincos(x)[0].sum())(x)
    cos_gradient = jax.grad(lambda x: sincos(x)[1].sum())(x)
    np.testing.assert_allclose(sin_gradient, np.cos(np.float64(x)), atol=2e-7)
    np.testing.assert_allclose(cos_gradient, -np.sin(np.float64(x)), atol=2e-7)


def test_both_modes_to_third_order():
    check_grads(lambda x: sincos(jnp.asarray(x)), (jnp.array([0.3, -1.2, 2.0]),), order=3, atol=1e-2, rtol=1e-2)


def test_higher_derivatives_repeat_every_fourth():
    derivative = lambda x: sincos(x)[0]  # noqa: E731
    for _ in range(4):
        derivative = jax.grad(derivative)
    x = jnp.linspace(-3.0, 3.0, 61)
    np.testing.assert_allclose(jax.jit(jax.vmap(derivative))(x), np.sin(np.float64(x)), atol=3e-7)


def test_backward_pass_reuses_the_pair():
    """One reduction serves value and gradient: the gradient's program calls `sincos` once."""
    gradient = jax.make_jaxpr(jax.value_and_grad(lambda x: sincos(x)[0]))(1.0)
    assert str(gradient).count("bitcast_convert_type[new_dtype=int32]") == 3


def test_vmap_equals_the_array_version():
    x = jnp.linspace(-9.0, 9.0, 12).reshape(3, 4)
    for mapped, whole in zip(jax.vmap(jax.vmap(sincos))(x), sincos(x), strict=True):
        np.testing.assert_allclose(mapped, whole, atol=2.5e-7)
