"""Padded batches of different architectures: the same numbers as each network alone, one compilation for all."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax.batching import unbatch_graphs
from ngjax.nn import NGGNN, GraphReadout, ParamsReadout, WeightSpaceModel
from ngjax.nn import gnn as gnn_module
from ngjax.nn.topology import ListTopology, read_graph
from tests.nn.small import BACKBONES, ENCODER, TwoHeads, error, jit, one, siren_spec, sirens, variables_of

ARCHITECTURES = ((2, 5, 4, 1), (2, 3, 1))
BUDGET = ngjax.GraphBudget(4, 30, 60, 15)
PROBED = ENCODER.__class__(**{**vars(ENCODER), "num_probes": 2})


def networks(architectures=ARCHITECTURES, seed=0):
    specs = [siren_spec(sizes) for sizes in architectures]
    return specs, [one(sirens(sizes, 1, seed=seed + i), 0) for i, sizes in enumerate(architectures)]


def batch_of(specs, params, budget):
    return ngjax.batch_graphs([ngjax.to_graph(s, p) for s, p in zip(specs, params, strict=True)], budget)


def poisoned(batch):
    """NaN in all padding."""
    nodes = jnp.where(batch.nodes.mask[:, None], batch.nodes.features, jnp.nan)
    edges = jnp.where(batch.edges.mask[..., None], batch.edges.features, jnp.nan)
    loose = jnp.where(batch.globals.mask[:, None, None], batch.globals.loose, jnp.nan)
    return batch._replace(
        nodes=batch.nodes._replace(features=nodes),
        edges=batch.edges._replace(features=edges),
        globals=batch.globals._replace(loose=loose),
    )


def model_of(kind, dtype=jnp.float32):
    pooling = "max_edge" if kind == "ng-t" else "cat_output"
    return TwoHeads(
        BACKBONES[kind](encoder=PROBED, dtype=dtype),
        GraphReadout(features=3, hidden=8, pooling=pooling, num_outputs=1, dtype=dtype),
        ParamsReadout(output_scale=0.1, dtype=dtype),
    )


@functools.cache
def model_and_variables(kind):
    model = model_of(kind)
    return model, variables_of(model, siren_spec(ARCHITECTURES[0]))


@contextlib.contextmanager
def float64():
    """Only what padding does can make a difference here, not the order of sums."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def doubled(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def total(logits, nodes, edges):
    return sum(jnp.sum(x**2) + jnp.sum(x) for x in (logits, nodes, edges))


@pytest.mark.parametrize("kind", BACKBONES)
def test_outputs_and_gradients_are_those_of_each_network_alone(kind):
    """Of the second network, with another before it and padding behind."""
    model, (_, variables) = model_of(kind, jnp.float64), model_and_variables(kind)
    specs, params = networks()

    def padded(variables, params):
        graph = poisoned(batch_of(specs, params, BUDGET))
        logits, edit = model.apply(variables, graph)
        graphs = [ngjax.to_graph(s, p) for s, p in zip(specs, params, strict=True)]
        own = unbatch_graphs(edit, graphs)[1]
        return total(logits[1], own.nodes.features, own.edges.features), (logits, edit, own)

    def alone(variables, network):
        logits, edit = model.apply(variables, ngjax.to_graph(specs[1], network))
        return total(logits, edit.nodes.features, edit.edges.features), (logits, edit)

    with float64():
        variables, params = doubled((variables, params))
        (_, (logits, edit, own)), gradients = jit(jax.value_and_grad(padded, (0, 1), has_aux=True))(variables, params)
        (_, (single, lone)), expected = jit(jax.value_and_grad(alone, (0, 1), has_aux=True))(variables, params[1])

        assert logits.dtype == np.float64
        assert np.all(np.isfinite(logits))
        assert error(logits[1:2], single) < 1e-12
        assert error(ngjax.to_params(specs[1], own), ngjax.to_params(specs[1], lone)) < 1e-12
        assert not np.any(edit.nodes.features[18:]), "padding of the result is zero"
        assert error(gradients[0], expected[0]) < 1e-12
        assert error(gradients[1][1], expected[1]) < 1e-12
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients[1][0])), "no word from one network to another"


@pytest.mark.parametrize("kind", BACKBONES)
def test_other_architectures_and_budgets(kind):
    """A batch of the same budget never compiles again; a full batch and one of padding mostly give the same numbers."""
    model, (_, variables) = model_of(kind, jnp.float64), model_and_variables(kind)
    traces = []

    @jit
    def run(variables, graph):
        traces.append(graph.nodes.features.shape)
        return model.apply(variables, graph)[0]

    with float64():
        variables = doubled(variables)
        specs, params = networks()
        params, other = doubled(params), networks(((1, 8, 1), (2, 2, 2, 2, 1), (3, 1)), seed=7)
        first = run(variables, batch_of(specs, params, BUDGET))
        swapped = run(variables, batch_of(specs[::-1], params[::-1], BUDGET))
        alone = run(variables, batch_of(specs[1:], params[1:], BUDGET))
        others = run(variables, poisoned(batch_of(other[0], doubled(other[1]), BUDGET)))
        assert len(traces) == 1
        assert np.all(np.isfinite(others))
        assert error(swapped[:2][::-1], first[:2]) < 1e-12
        assert error(alone[:1], first[1:2]) < 1e-12

        # Nothing to spare, and more nodes per graph than the last one has.
        full = ngjax.GraphBudget(2, 12 + 6, 34 + 9, 15)
        assert error(run(variables, batch_of(specs, params, full)), first[:2]) < 1e-12
    assert len(traces) == 2


def test_a_new_spec_compiles_once():
    model, variables = model_and_variables("ng-gnn")
    traces = []

    @functools.partial(jit, static_argnums=2)
    def run(variables, params, spec):
        traces.append(spec)
        return model.apply(variables, ngjax.to_groups(spec, params), spec=spec)[0]

    _, (network, _) = networks()
    for seed in range(3):
        _, (network, _) = networks(seed=seed)
        run(variables, network, siren_spec(ARCHITECTURES[0]))  # equal by value, another object each time
    assert len(traces) == 1


def test_padding_does_not_grow_in_the_normalization():
    specs, params = networks()
    topology = ListTopology(batch_of(specs, params, BUDGET), reverse=True)
    nodes = jnp.asarray(np.random.default_rng(0).standard_normal((30, 4)), jnp.float32)
    for scope in ("graph", "batch"):
        result = jit(lambda x, scope=scope: gnn_module.graph_norm(topology, x, scope))(nodes)
        real = np.asarray(nodes)[:18]
        parts = [real] if scope == "batch" else [real[:12], real[12:]]
        expected = np.concatenate([(x - x.mean()) / (x.std() + 1e-5) for x in parts])
        np.testing.assert_allclose(result[:18], expected, rtol=1e-5, atol=1e-6)
        assert not np.any(result[18:])


@pytest.mark.parametrize("kind", BACKBONES)
def test_networks_larger_than_the_tables_get_nan_in_an_edge_list(kind):
    """Their sizes are not known before the program runs: NaN, and the other networks of the batch are as they were."""
    model = WeightSpaceModel(BACKBONES[kind](encoder=PROBED), GraphReadout(features=3, hidden=8, pooling="mean"))
    variables = variables_of(model, siren_spec(ARCHITECTURES[0]))
    run = jit(model.apply)
    _, (network, _) = networks()
    fits = run(variables, batch_of(*networks(), BUDGET))
    for sizes in ((4, 2, 1), (2, 1, 1, 1, 1, 1), (2, 3, 3)):  # more than 3 inputs, 3 hidden layers, 2 outputs
        specs, params = networks((ARCHITECTURES[0], sizes))
        logits = run(variables, batch_of(specs, [network, params[1]], BUDGET))
        assert error(logits[:1], fits[:1]) < 1e-6
        assert np.all(np.isnan(logits[1])), sizes


def test_readouts_that_are_too_shallow_give_nan_in_an_edge_list():
    specs, params = networks(((2, 2, 1), (2, 2, 2, 1)))
    model = WeightSpaceModel(NGGNN(features=4, num_layers=1, encoder=ENCODER), ParamsReadout(max_layers=2))
    variables = variables_of(model, specs[0])
    batch = batch_of(specs, params, BUDGET)
    shallow, deep = unbatch_graphs(
        jit(model.apply)(variables, batch), [ngjax.to_graph(s, p) for s, p in zip(specs, params, strict=True)]
    )
    assert np.all(np.isfinite(shallow.edges.features))
    assert np.all(np.isnan(deep.edges.features[-2:])), "the third layer"
    with pytest.raises(ValueError, match="factors for 2 layers, but the network has 3"):
        jax.eval_shape(lambda: model.apply(variables, ngjax.to_graph(specs[1], params[1]), spec=specs[1]))


def test_reading_sets_padding_to_zero():
    batch = poisoned(batch_of(*networks(), BUDGET))
    _, nodes, (edges,), _ = read_graph(batch, None, reverse=False)
    assert np.all(np.isfinite(nodes))
    assert np.all(np.isfinite(edges))
