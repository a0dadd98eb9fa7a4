"""The edge list and the blocks give the same numbers from the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax.nn import EncoderConfig, GraphReadout, ParamsReadout, WeightSpaceModel, WeightStatistics
from tests.nn.small import BACKBONES, ENCODER, TwoHeads, error, gnn, jit, ngt, one, siren_spec, sirens, variables_of

SIZES = (2, 5, 4, 1)
STATISTICS = WeightStatistics((0.1, 0.2, -0.1), (0.5, 0.2, 0.1), (0.3, -0.1, 0.2), (0.4, 0.3, 0.7))


def encoder(**settings):
    return ENCODER.__class__(**{**vars(ENCODER), **settings})


EVERYTHING = {"statistics": STATISTICS, "depth": 2, "num_probes": 3, "fourier_frequencies": 4, "fourier_scale": 1.0}

# Between them, every option of the encoder, the backbones and the readouts, against its default.
MODELS = {
    "gnn, all features": TwoHeads(
        gnn(encoder=encoder(**EVERYTHING), mean_log_degree=1.3),
        GraphReadout(features=3, hidden=8, num_outputs=1, probe_outputs=True),
        ParamsReadout(features=2, statistics=STATISTICS),
    ),
    "gnn, bare": TwoHeads(
        gnn(encoder=encoder(reverse_edges=False, positions="none", zero_biases=True), norm_scope="batch"),
        GraphReadout(features=3, hidden=8, pooling="mean_edge", layer_norm=False, num_hidden=1),
        ParamsReadout(output_scale=None),
    ),
    "ngt, all features": TwoHeads(
        ngt(encoder=encoder(**EVERYTHING), class_token=True),
        GraphReadout(features=3, hidden=8, pooling="token"),
        ParamsReadout(statistics=STATISTICS),
    ),
    "ngt, bare": TwoHeads(
        ngt(
            encoder=encoder(reverse_edges=False, positions="none", zero_weights=True),
            modulate_values=False,
            last_edge_update=False,
        ),
        GraphReadout(features=3, hidden=8, pooling="max_edge"),
    ),
}


@pytest.fixture(scope="module")
def networks():
    return siren_spec(SIZES), sirens(SIZES, 2, seed=3)


def total(logits, graph):
    """A number that depends on every output in its own way."""
    leaves = [logits, graph.nodes.features, graph.edges.features]
    return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)) for x in leaves)


@pytest.mark.parametrize("name", MODELS)
def test_both_paths_give_the_same(name, networks):
    spec, params = networks
    model = MODELS[name]
    network = one(params, 0)
    variables = variables_of(model, spec)

    def run(variables, network, spec_of_blocks):
        graph = ngjax.to_graph(spec, network)
        logits, edit = model.apply(variables, graph, spec=spec_of_blocks)
        return total(logits.reshape(-1), edit), (logits.reshape(-1), edit)

    def both(variables, network):
        # Of NG-GNN, whose maxima have derivatives of their own.
        if name != "gnn, all features":
            runs = [(run(variables, network, known), ()) for known in (spec, None)]
        else:
            with_gradient = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
            runs = [with_gradient(variables, network, known) for known in (spec, None)]
        return [(*gradients, aux[0], aux[1].nodes.features, aux[1].edges.features) for (_, aux), gradients in runs]

    blocks, edge_list = jit(both)(variables, network)
    for ours, theirs in zip(blocks, edge_list, strict=True):
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("kind", BACKBONES)
def test_batch_axes_vmap_and_graph_types_give_the_same(kind, networks):
    spec, params = networks
    model = TwoHeads(BACKBONES[kind](), GraphReadout(features=3, hidden=8))
    variables = variables_of(model, spec)

    def run(params):
        logits, edit = model.apply(variables, ngjax.to_groups(spec, params), spec=spec)
        return logits, ngjax.to_params(spec, edit)

    def run_all(params):
        stacked = run(params)
        listed_logits, listed = model.apply(variables, ngjax.to_graph(spec, params), spec=spec)
        two_axes = run(jax.tree.map(lambda x: x[:, None], params))
        return (
            stacked,
            jax.vmap(run)(params),
            (listed_logits, ngjax.to_params(spec, listed)),
            jax.tree.map(lambda x: x[:, 0], two_axes),
        )

    stacked, *others = jit(run_all)(params)
    assert stacked[0].shape == (2, 3)
    assert error(stacked[0][:1], stacked[0][1:]) > 1e-3, "the two networks differ"
    for other in others:
        assert error(other, stacked) < 1e-6


@pytest.mark.parametrize("kind", BACKBONES)
@jax.numpy_dtype_promotion("standard")  # flax's LayerNorm relies on it for bfloat16
def test_bfloat16_stays_close(kind, networks):
    spec, params = networks
    settings = EncoderConfig(**{**vars(ENCODER), "num_probes": 2, "fourier_frequencies": 3, "fourier_scale": 0.5})
    models = [
        WeightSpaceModel(
            BACKBONES[kind](encoder=settings, dtype=dtype),
            GraphReadout(features=3, hidden=8, num_outputs=1, probe_outputs=True, dtype=dtype),
        )
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    variables = variables_of(models[0], spec)
    graph = ngjax.to_graph(spec, one(params, 0))
    wide, narrow, narrow_list = jit(
        lambda: (
            models[0].apply(variables, graph, spec=spec),
            models[1].apply(variables, graph, spec=spec),
            models[1].apply(variables, graph)[0],
        )
    )()
    assert narrow.dtype == jnp.bfloat16
    assert 0 < error(narrow, wide) < 0.1
    assert error(narrow_list, wide) < 0.1


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("pooling", ["cat_output", "mean_output", "max_output", "mean", "max", "mean_edge", "max_edge"])
def test_poolings_by_hand(kind, pooling, networks):
    from ngjax.nn.readout import pool
    from ngjax.nn.topology import read_graph

    spec = siren_spec((2, 3, 2))
    rng = np.random.default_rng(0)
    nodes = rng.standard_normal((7, 4)).astype(np.float32)
    pairs = rng.standard_normal((7, 7, 4)).astype(np.float32)
    joined = np.zeros((7, 7), bool)
    joined[:2, 2:5] = joined[2:5, 5:] = True
    if kind == "ng-gnn":
        pairs *= joined[..., None]
    features = np.concatenate([pairs[:2, 2:5].reshape(-1, 4), pairs[2:5, 5:].reshape(-1, 4)])[:, None]
    graph = ngjax.to_graph(spec, one(sirens((2, 3, 2), 1), 0))
    graph = graph._replace(
        nodes=graph.nodes._replace(features=jnp.asarray(nodes)),
        edges=graph.edges._replace(features=jnp.asarray(features)),
        globals=graph.globals._replace(pairs=jnp.asarray(pairs)[None] if kind == "ng-t" else None),
    )
    expected = {
        "cat_output": nodes[5:].reshape(-1),
        "mean_output": nodes[5:].mean(0),
        "max_output": nodes[5:].max(0),
        "mean": nodes.mean(0),
        "max": nodes.max(0),
        "mean_edge": pairs.mean((0, 1)),
        "max_edge": pairs.max((0, 1)),
    }[pooling]

    def run(graph, known):
        topology, n, e, g = read_graph(graph, known, reverse=False)
        return pool(topology, n, e, g, pooling, 2).reshape(-1)

    for known in (spec, None):
        np.testing.assert_allclose(run(graph, known), expected, rtol=1e-6, atol=1e-7)
