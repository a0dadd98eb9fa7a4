import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax.actions import fixed, permutation
from ngjax.graph import GlobalData
from ngjax.nn import GraphReadout, ParamsReadout, WeightSpaceModel
from ngjax.nn.readout import pool
from ngjax.nn.topology import BlockTopology
from ngjax.spec import EdgeGroup, NeuralGraphSpec, NodeGroup, ParamSpec, PathKey, param_view
from tests.nn.small import BACKBONES, ENCODER, TwoHeads, error, gnn, jit, one, siren_spec, sirens, variables_of

SIZES = (2, 5, 4, 1)


@pytest.mark.parametrize("kind", ["ng-gnn", "ng-t"])
def test_logits_start_with_order_one_and_differ_between_networks(kind):
    """With the settings of the experiments, and the initialization that the library draws."""
    encoder = ngjax.EncoderConfig(max_inputs=2, max_hidden_layers=2, max_outputs=1)
    model = WeightSpaceModel((ngjax.NGGNN if kind == "ng-gnn" else ngjax.NGT)(encoder=encoder), GraphReadout())
    spec = siren_spec((2, 16, 16, 1))
    groups = ngjax.to_groups(spec, sirens((2, 16, 16, 1), 32))
    logits = jit(lambda key: model.init_with_output(key, groups, spec=spec)[0])(jax.random.key(0))
    assert logits.shape == (32, 10)
    assert 0.1 < np.std(logits) < 10
    between = np.std(logits, axis=0)
    assert np.median(between) > 0.02, between


def conv_spec():
    """A convolution of 3 x 3, one of 2 x 1, and a dense layer."""
    shapes = [("conv1", (3, 3, 2, 4)), ("conv2", (2, 1, 4, 3)), ("dense", (3, 1))]
    actions = [fixed("image", 2, "input"), permutation("f1", 4), permutation("f2", 3), fixed("out", 1, "output")]
    taps = [fixed(f"taps_{n}", n, "conv") for n in (1, 2, 3)]
    params, nodes, edges = [], [NodeGroup("image", 2, "input", 0, "image", slots=2)], []
    for i, (name, shape) in enumerate(shapes):
        source, target = actions[i], actions[i + 1]
        last = i == 2
        paths = [(PathKey("dict", name), PathKey("dict", leaf)) for leaf in ("bias", "kernel")]
        params.append(ParamSpec(paths[0], (shape[-1],), "float32", (target.id,)))
        spatial = tuple(f"taps_{n}" for n in shape[:-2])
        params.append(ParamSpec(paths[1], shape, "float32", (*spatial, source.id, target.id)))
        nodes.append(
            NodeGroup(
                target.id,
                shape[-1],
                "output" if last else "hidden",
                i + 1,
                target.id,
                "none" if last else "relu",
                bias=param_view(2 * i, (shape[-1],), target=(0,)),
            )
        )
        rank = len(shape)
        view = param_view(2 * i + 1, shape, kernel=range(rank - 2), source=(rank - 2,), target=(rank - 1,))
        edges.append(EdgeGroup(name, source.id, target.id, view=view))
    return NeuralGraphSpec(tuple(params), tuple(nodes), tuple(edges), (*actions, *taps))


@pytest.mark.parametrize("kind", BACKBONES)
def test_convolution_kernels_on_both_paths(kind):
    """One edge with many features; edits have the shape of the kernels, and each kernel position its own."""
    spec = conv_spec()
    encoder = ENCODER.__class__(**{**vars(ENCODER), "kernel_range": (1, 3, 3)})
    model = TwoHeads(
        BACKBONES[kind](encoder=encoder),
        GraphReadout(features=3, hidden=8, pooling="mean"),
        ParamsReadout(kernel_range=(1, 3, 3), output_scale=1.0),
    )
    rng = np.random.default_rng(0)
    network = spec.unflatten([jnp.asarray(rng.standard_normal(p.shape), jnp.float32) for p in spec.params])
    variables = variables_of(model, spec)

    @jit
    def run(network):
        results = [model.apply(variables, ngjax.to_groups(spec, network), spec=spec)]
        results.append(model.apply(variables, ngjax.to_graph(spec, network)))
        return [(logits.reshape(-1), ngjax.to_params(spec, edit)) for logits, edit in results]

    blocks, edge_list = run(network)
    assert error(edge_list[0], blocks[0]) < 1e-5
    assert error(edge_list[1], blocks[1]) < 1e-5
    assert jax.tree.map(jnp.shape, blocks[1]) == jax.tree.map(jnp.shape, network)
    assert len(np.unique(blocks[1]["conv1"]["kernel"][:, :, 0, 0])) == 9
    # Every position of a kernel is read.
    for place in ((0, 0), (1, 1), (2, 1)):
        changed = {**network, "conv1": {**network["conv1"]}}
        changed["conv1"]["kernel"] = network["conv1"]["kernel"].at[*place, 1, 2].add(1.0)
        assert error(run(changed)[0][0], blocks[0]) > 1e-4

    # In a padded batch, the NaN of kernel positions that an edge does not have reach nothing.
    graph = ngjax.to_graph(spec, network)
    features = jnp.where(graph.edges.mask[..., None], graph.edges.features, jnp.nan)
    assert np.any(np.isnan(features))
    poisoned = graph._replace(edges=graph.edges._replace(features=features))
    assert error(jit(model.apply)(variables, poisoned)[0][0], blocks[0]) < 1e-5


def test_outputs_of_input_nodes_are_zero():
    spec = siren_spec(SIZES)
    model = WeightSpaceModel(gnn(num_layers=1), ParamsReadout())
    variables = variables_of(model, spec)
    network = one(sirens(SIZES, 1), 0)
    edit = jit(lambda: model.apply(variables, ngjax.to_graph(spec, network)))()
    assert not np.any(edit.nodes.features[:2])
    assert np.all(edit.nodes.features[2:])


def test_wrong_settings_are_named():
    spec = siren_spec(SIZES)
    network = one(sirens(SIZES, 1), 0)
    groups, graph = ngjax.to_groups(spec, network), ngjax.to_graph(spec, network)

    def refuses(match, readout, graph, known):
        model = WeightSpaceModel(gnn(num_layers=1), readout)
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(lambda: model.init(jax.random.key(0), graph, spec=known))

    refuses("'token' needs a model with class_token=True", GraphReadout(pooling="token"), groups, spec)
    refuses("probe_outputs=True needs .* num_probes > 0", GraphReadout(probe_outputs=True), groups, spec)
    refuses("for 3 output neurons, the network has 1", GraphReadout(num_outputs=3), groups, spec)
    refuses("without spec= .* must be given: num_outputs", GraphReadout(), graph, None)
    refuses("factors for 2 layers, but the network has 3", ParamsReadout(max_layers=2), groups, spec)
    refuses("bias_alignment='reference' needs spec=", ParamsReadout(bias_alignment="reference"), graph, None)
    with pytest.raises(ValueError, match="unknown pooling 'sum'; known are cat_output, mean_output"):
        pool(
            BlockTopology(spec, reverse=False),
            groups.nodes,
            groups.edges,
            GlobalData(groups.globals.loose),
            "sum",
            None,
        )
