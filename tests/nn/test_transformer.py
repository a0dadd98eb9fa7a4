"""The mathematics of NG-T by hand, and where its input is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax.nn.transformer import AttentionMaps, in_row_blocks, relational_attention
from tests.nn.small import jit, ngt, one, siren_spec, sirens, variables_of

HEADS, WIDTH, NODES, CHANNELS = 2, 3, 4, 5


def random_attention(modulate):
    """Queries, keys, values, pairs and maps."""
    rng = np.random.default_rng(0)
    nodes = [rng.standard_normal((NODES, HEADS * WIDTH)).astype(np.float32) for _ in range(3)]
    pairs = rng.standard_normal((NODES, NODES, CHANNELS)).astype(np.float32)
    maps = [rng.standard_normal((CHANNELS, HEADS * WIDTH)).astype(np.float32) for _ in range(4)]
    return (*nodes, pairs, AttentionMaps(*maps[:3], maps[3] if modulate else None))


def by_loops(queries, keys, values, pairs, maps, mask):
    result = np.zeros((NODES, HEADS * WIDTH))
    for h in range(HEADS):
        own = slice(h * WIDTH, (h + 1) * WIDTH)
        for i in range(NODES):
            logits, mixed = [], []
            for j in range(NODES):
                if not mask[j]:
                    continue
                query = queries[i, own] + pairs[i, j] @ maps.query[:, own]
                key = keys[j, own] + pairs[i, j] @ maps.key[:, own]
                logits.append(query @ key / np.sqrt(HEADS * WIDTH))
                multiply = 1 if maps.multiply is None else pairs[i, j] @ maps.multiply[:, own]
                mixed.append(values[j, own] * multiply + pairs[i, j] @ maps.add[:, own])
            weights = np.exp(logits - np.max(logits))
            result[i, own] = weights / weights.sum() @ np.array(mixed)
    return result


@pytest.mark.parametrize("modulate", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_by_loops(modulate, masked):
    inputs = random_attention(modulate)
    mask = np.array([True, False, True, True]) if masked else np.ones(NODES, bool)
    attend = jax.jit(relational_attention, static_argnums=5)
    result = attend(*inputs, HEADS, jnp.asarray(mask) if masked else None)
    np.testing.assert_allclose(result, by_loops(*inputs, mask), rtol=1e-4, atol=1e-5)


def test_pairs_that_are_never_seen_are_finite():
    """A padding graph has masked keys alone: finite values, and a derivative of zero."""
    queries, *others = jax.tree.map(jnp.asarray, random_attention(modulate=True))
    nowhere = jnp.zeros(NODES, bool)
    gradient = jax.grad(lambda x: 0 * jnp.sum(relational_attention(x, *others, HEADS, nowhere)))(queries)
    assert not np.any(gradient)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_attention_of_a_few_rows_at_a_time(rows):
    """The same values and gradients, also where the last block is not full."""
    queries, keys, values, pairs, maps = random_attention(modulate=True)
    batched = [jnp.stack([x, 2 * x]) for x in (queries, keys, values, pairs)]

    def attend(rows, queries, keys, values, pairs, maps):
        return in_row_blocks(
            lambda queries, pairs: relational_attention(queries, keys, values, pairs, maps, HEADS, None),
            rows,
            (queries, pairs),
            axes=(-2, -3),
        )

    def value_and_gradients(rows):
        def loss(inputs):
            result = attend(rows, *inputs)
            return jnp.sum(jnp.sin(result)), result

        return jit(jax.value_and_grad(loss, has_aux=True))((*batched, maps))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        value_and_gradients(rows),
        value_and_gradients(None),
    )


def test_more_nodes_than_the_memory_holds_are_refused():
    spec = siren_spec((2, 3, 1))
    groups = ngjax.to_groups(spec, one(sirens((2, 3, 1), 1), 0))
    with pytest.raises(ValueError, match=r"all pairs of 6 nodes: about 0\.0 GB.*memory_limit=1e-06; use NG-GNN"):
        jax.eval_shape(lambda: ngt(memory_limit=1e-6).init(jax.random.key(0), groups, spec=spec))
    wide = siren_spec((2, 40_000, 1))
    zeros = ngjax.graph.GroupedGraph(
        jax.ShapeDtypeStruct((40_003, 1), jnp.float32),
        tuple(jax.ShapeDtypeStruct((1, m, n, 1, 1), jnp.float32) for m, n in ((2, 40_000), (40_000, 1))),
        ngjax.graph.GlobalData(jax.ShapeDtypeStruct((0, 1), jnp.float32)),
    )
    with pytest.raises(
        ValueError, match=r"40,003 nodes: about [\d,]+\.\d GB per graph and layer, more than memory_limit=8"
    ):
        jax.eval_shape(lambda g: ngjax.NGT().init(jax.random.key(0), g, spec=wide), zeros)


def test_heads_that_do_not_divide_the_width_are_refused():
    spec = siren_spec((2, 3, 1))
    groups = ngjax.to_groups(spec, one(sirens((2, 3, 1), 1), 0))
    with pytest.raises(ValueError, match="attention_features=8.*num_heads=3"):
        jax.eval_shape(lambda: ngt(num_heads=3).init(jax.random.key(0), groups, spec=spec))


def test_the_last_edge_update_is_left_out_on_request():
    spec = siren_spec((2, 3, 1))
    with_update, without = (variables_of(ngt(last_edge_update=on), spec)["params"] for on in (True, False))
    assert "edge_in" in with_update["layer_1"]
    assert "edge_in" not in without["layer_1"]
    assert "edge_in" in without["layer_0"]


@pytest.mark.parametrize("in_groups", [True, False])
def test_updating_edges_alone_gives_the_same_edges(in_groups):
    spec, network = siren_spec((2, 3, 1)), one(sirens((2, 3, 1), 1), 0)
    graph = ngjax.to_groups(spec, network) if in_groups else ngjax.to_graph(spec, network)
    everywhere, at_edges = (ngt(last_edge_update=on, class_token=True, pair_means=True) for on in (True, "edges"))
    variables = variables_of(everywhere, spec)
    options = {"spec": spec} if in_groups else {}
    expected, found = (
        jax.jit(functools.partial(model.apply, **options))(variables, graph) for model in (everywhere, at_edges)
    )
    assert found.globals.pairs is None
    assert expected.globals.pairs is not None
    for ours, theirs in ((found.nodes, expected.nodes), (found.edges, expected.edges)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, theirs)
