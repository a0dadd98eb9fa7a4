"""The MLP on flattened weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngjax.baselines import FlatMLP, flat_statistics, flatten_params


def networks(count=6, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "layer_0": {
            "kernel": jnp.asarray(rng.normal(3.0, 2.0, size=(count, 2, 4)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=(count, 4)), jnp.float32),
        },
        "layer_1": {"kernel": jnp.ones((count, 4, 1)), "bias": jnp.zeros((count, 1))},
    }


def test_every_weight_stands_once_in_its_row():
    params = networks()
    flat = flatten_params(params)
    assert flat.shape == (6, 4 + 8 + 1 + 4)
    expected = np.concatenate([np.ravel(leaf[3]) for leaf in jax.tree.leaves(params)])
    np.testing.assert_array_equal(flat[3], expected)


@pytest.mark.parametrize("params", [{}, {"a": jnp.zeros(())}, {"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 3))}])
def test_leaves_without_a_common_batch_axis_raise(params):
    with pytest.raises(ValueError, match="same B"):
        flatten_params(params)


def test_statistics_standardize_and_constant_weights_vanish():
    params = networks(count=400)
    statistics = flat_statistics(params)
    model = FlatMLP(num_outputs=3, hidden=(5,))
    variables = model.init(jax.random.key(0), params, statistics)
    kernel = variables["params"]["MLP_0"]["Dense_0"]["kernel"]
    # The input of the first layer, read through a kernel that is the identity.
    eye = {"params": {"MLP_0": {"Dense_0": {"kernel": jnp.eye(17), "bias": jnp.zeros(17)}}}}
    standardized = FlatMLP(num_outputs=17, hidden=()).apply(eye, params, statistics)
    assert kernel.shape == (17, 5)
    np.testing.assert_allclose(standardized[:, :12].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(standardized[:, :12].std(axis=0), 1, atol=1e-4)
    np.testing.assert_array_equal(standardized[:, 12:], 0)


def test_logits_depend_on_the_order_of_neurons():
    """What this baseline gets wrong: the same function, other logits."""
    params = networks()
    order = jnp.array([1, 0, 3, 2])
    permuted = {
        "layer_0": {"kernel": params["layer_0"]["kernel"][:, :, order], "bias": params["layer_0"]["bias"][:, order]},
        "layer_1": params["layer_1"],
    }
    statistics = flat_statistics(params)
    model = FlatMLP(num_outputs=3)
    variables = model.init(jax.random.key(0), params, statistics)
    logits, moved = (model.apply(variables, each, statistics) for each in (params, permuted))
    assert logits.shape == (6, 3)
    assert np.abs(logits - moved).max() > 0.1 * np.abs(logits).max()


def test_networks_do_not_see_each_other():
    params = networks()
    statistics = flat_statistics(params)
    model = FlatMLP(num_outputs=3)
    variables = model.init(jax.random.key(0), params, statistics)
    alone = model.apply(variables, jax.tree.map(lambda leaf: leaf[2:3], params), statistics)
    np.testing.assert_allclose(model.apply(variables, params, statistics)[2:3], alone, atol=1e-6)
