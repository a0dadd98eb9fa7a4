import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax

SPEC = ngjax.mlp_spec((2, 3, 1))


def network(**leaves):
    params = {
        f"layer_{i}": {"kernel": np.ones(shape), "bias": np.ones(shape[1])} for i, shape in enumerate([(2, 3), (3, 1)])
    }
    params["layer_1"] |= leaves
    return params


def test_good_weights_pass():
    ngjax.check_params(network(), spec=SPEC)
    ngjax.check_params(jax.tree.map(lambda x: jnp.ones((5, *x.shape), jnp.bfloat16), network()), spec=SPEC)
    ngjax.check_params({"step": np.int64(3), "key": jax.random.key(0), "flag": np.array([True])})


@pytest.mark.parametrize("dtype", [np.float64, jnp.bfloat16])
def test_nan_and_infinity_are_named_with_their_place(dtype):
    kernel = np.ones((3, 1), dtype)
    kernel[1, 0], kernel[2, 0] = np.inf, np.nan
    message = r"^zoo/7\.npz: parameter layer_1/kernel \(3, 1\): 2 of 3 values .* the first at \(1, 0\)$"
    with pytest.raises(ValueError, match=message):
        ngjax.check_params(network(kernel=kernel), source="zoo/7.npz")
    with pytest.raises(ValueError, match="^parameter layer_1/kernel"):
        ngjax.check_params(network(kernel=kernel))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.ones((3, 1), np.complex64), "is complex64; expected a real array"),
        (2.5, "expected an array, received float"),
        (jax.ShapeDtypeStruct((3, 1), jnp.float32), "has no values here"),
    ],
)
def test_leaves_that_are_no_real_arrays_are_named(leaf, message):
    with pytest.raises(TypeError, match=rf"^a\.npz: parameter layer_1/kernel:? ?.*{message}"):
        ngjax.check_params(network(kernel=leaf), source="a.npz")


def test_traced_weights_are_refused():
    with pytest.raises(TypeError, match=r"layer_0/bias has no values here.*outside jit"):
        jax.jit(ngjax.check_params)(network())


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (np.ones((4, 1)), ValueError, r"layer_1/kernel: expected shape \(3, 1\).*received \(4, 1\)"),
        (np.ones((3, 1), np.int32), TypeError, "layer_1/kernel: expected a floating array, received int32"),
    ],
)
def test_another_architecture_is_named_with_its_file(leaf, error, message):
    with pytest.raises(error, match=rf"^a\.npz: .*{message}"):
        ngjax.check_params(network(kernel=leaf), spec=SPEC, source="a.npz")
