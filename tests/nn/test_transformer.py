"""The mathematics of NG-T by hand, and where its input is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax.nn.transformer import relational_attention
from tests.nn.small import jit, ngt, one, siren_spec, sirens, variables_of

HEADS, WIDTH, NODES = 2, 3, 4


def by_loops(qkv_node, qkv_edge, mask, modulate):
    result = np.zeros((NODES, HEADS * WIDTH))
    for h in range(HEADS):
        q, k, v = np.split(qkv_node[:, h], 3, axis=-1)
        for i in range(NODES):
            logits, values = [], []
            for j in range(NODES):
                if not mask[j]:
                    continue
                q_edge, k_edge, add, *mul = np.split(qkv_edge[i, j, h], 4 if modulate else 3)
                logits.append((q[i] + q_edge) @ (k[j] + k_edge) / np.sqrt(HEADS * WIDTH))
                values.append(v[j] * (mul[0] if modulate else 1) + add)
            weights = np.exp(logits - np.max(logits))
            result[i, h * WIDTH : (h + 1) * WIDTH] = weights / weights.sum() @ np.array(values)
    return result


@pytest.mark.parametrize("modulate", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_by_loops(modulate, masked):
    rng = np.random.default_rng(0)
    qkv_node = rng.standard_normal((NODES, HEADS, 3 * WIDTH)).astype(np.float32)
    qkv_edge = rng.standard_normal((NODES, NODES, HEADS, (4 if modulate else 3) * WIDTH)).astype(np.float32)
    mask = np.array([True, False, True, True]) if masked else np.ones(NODES, bool)
    result = jit(relational_attention)(qkv_node, qkv_edge, jnp.asarray(mask) if masked else None)
    np.testing.assert_allclose(result, by_loops(qkv_node, qkv_edge, mask, modulate), rtol=1e-4, atol=1e-5)


def test_pairs_that_are_never_seen_are_finite():
    """A padding graph has masked keys alone: finite values, and a derivative of zero."""
    node, edge = jnp.ones((NODES, HEADS, 9)), jnp.ones((NODES, NODES, HEADS, 12))
    gradient = jit(jax.grad(lambda x: 0 * jnp.sum(relational_attention(x, edge, jnp.zeros(NODES, bool)))))(node)
    assert not np.any(gradient)


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
