"""The readout of what networks answer to learned inputs."""

import functools

import jax
import numpy as np
import pytest

import ngjax
from ngjax.baselines import ProbeReadout
from ngjax.zoo import apply_siren, init_siren

SIZES = (2, 8, 1)


@pytest.fixture(scope="module")
def networks():
    return jax.vmap(lambda key: init_siren(key, SIZES))(jax.random.split(jax.random.key(0), 5))


@pytest.fixture(scope="module")
def model():
    apply = functools.partial(apply_siren, output_offset=0.5)
    return ProbeReadout(apply, num_inputs=2, num_outputs=10, num_probes=7, hidden=(16,))


@pytest.fixture(scope="module")
def variables(model, networks):
    return model.init(jax.random.key(1), networks)


def test_probes_start_in_the_range_of_coordinates(model, networks):
    many = model.clone(num_probes=2000).init(jax.random.key(0), networks)["params"]["probes"]
    assert many.shape == (2000, 2)
    assert -1 <= many.min() < -0.99
    assert 0.99 < many.max() <= 1


def test_logits_read_the_answers_of_each_network(model, variables, networks):
    logits = model.apply(variables, networks)
    assert logits.shape == (5, 10)
    params = variables["params"]
    one = jax.tree.map(lambda leaf: leaf[3], networks)
    answers = apply_siren(one, params["probes"], output_offset=0.5).ravel()
    first, last = params["MLP_0"]["Dense_0"], params["MLP_0"]["Dense_1"]
    hidden = jax.nn.relu(answers @ first["kernel"] + first["bias"])
    np.testing.assert_allclose(logits[3], hidden @ last["kernel"] + last["bias"], atol=1e-5)


def test_probes_are_trained_through_the_networks(model, variables, networks):
    gradient = jax.grad(lambda variables: model.apply(variables, networks)[:, 0].sum())(variables)
    assert (np.abs(gradient["params"]["probes"]) > 0).all()


def test_logits_do_not_depend_on_the_order_of_neurons(model, variables, networks):
    spec = ngjax.mlp_spec(SIZES, activation="siren")
    permuted = ngjax.permute_params(spec, ngjax.random_permutations(jax.random.key(2), spec), networks)
    assert not np.allclose(permuted["layer_0"]["bias"], networks["layer_0"]["bias"])
    np.testing.assert_allclose(model.apply(variables, permuted), model.apply(variables, networks), atol=1e-5)
