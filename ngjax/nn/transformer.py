"""NG-T: a relational transformer with multiplicative node-edge interaction (Kofinas et al. 2024, section 3.2).

Differences from the relational transformer (Diao and Loynd 2023): values are modulated by edges (`v_mul`), and edge
updates read the edge in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Bool, Float

from ngjax.graph import GroupedGraph
from ngjax.nn.activations import gelu
from ngjax.nn.encoder import EncoderConfig, GraphEncoder
from ngjax.nn.linear import Dense, at_least_float32, linear
from ngjax.nn.topology import Edges, Topology, read_graph
from ngjax.spec import NeuralGraphSpec

_MASKED = -1e30  # finite: a row of masked keys alone, which only padding has, stays finite as well


class AttentionMaps(NamedTuple):
    """What a pair's features are mapped with. Columns are those of all heads, one head after the other.

    Attributes:
      query, key, add: part of queries, of keys, and what is added to values.
      multiply: what values are multiplied by, if they are.
    """

    query: Float[Array, "c D"]
    key: Float[Array, "c D"]
    add: Float[Array, "c D"]
    multiply: Float[Array, "c D"] | None


def relational_attention(
    queries: Float[Array, "... R D"],
    keys: Float[Array, "... N D"],
    values: Float[Array, "... N D"],
    pairs: Float[Array, "... R N c"],
    maps: AttentionMaps,
    num_heads: int,
    key_mask: Bool[Array, "... N"] | None,
) -> Float[Array, "... R D"]:
    """Attention of nodes to all nodes in which every pair has its own query, key and value.

    `q_ij = q_i + q^e_ij`, `k_ij = k_j + k^e_ij`, `v_ij = v_j * v^mul_ij + v^add_ij` (without modulation
    `v_j + v^add_ij`), scaled by the root of the total width of all heads. What is added to values is linear in the
    pair, so pairs are averaged first and mapped then: one vector per node and head instead of one per pair.

    Args:
      queries: of some or all nodes, the heads one after the other.
      keys: of all nodes.
      values: of all nodes.
      pairs: features of the pairs of the former with the latter.
      maps: see `AttentionMaps`.
      num_heads: into which D is divided.
      key_mask: False for nodes that must not be seen.
    """
    width = queries.shape[-1]
    by_head = (num_heads, width // num_heads)
    products = (queries[..., :, None, :] + linear(pairs, maps.query)) * (
        keys[..., None, :, :] + linear(pairs, maps.key)
    )
    wide = at_least_float32(products.dtype)
    logits = jnp.sum(products.reshape(*products.shape[:-1], *by_head).astype(wide), axis=-1) / math.sqrt(width)
    if key_mask is not None:
        logits = jnp.where(key_mask[..., None, :, None], logits, _MASKED)
    weights = jax.nn.softmax(logits, axis=-2).astype(values.dtype)

    mean_pairs = jnp.einsum("nhj,njc->nhc", _flat(jnp.swapaxes(weights, -1, -2), 2), _flat(pairs, 2))
    added = jnp.einsum("nhc,chd->nhd", mean_pairs, maps.add.reshape(-1, *by_head))
    if maps.multiply is None:
        mixed = jnp.einsum("...ijh,...jhd->...ihd", weights, values.reshape(*values.shape[:-1], *by_head))
    else:
        # The weight of a head for each of its columns, as a product with zeros and ones: the derivative of a broadcast
        # is a sum over so few columns that XLA's CPU code is several times slower with it.
        columns = jnp.repeat(jnp.eye(num_heads, dtype=values.dtype), by_head[1], axis=1)
        mixed = linear(weights, columns, precision="highest") * (values[..., None, :, :] * linear(pairs, maps.multiply))
        mixed = jnp.sum(mixed, axis=-2)
    return mixed.reshape(queries.shape) + added.reshape(queries.shape)


def in_row_blocks(
    function: Callable[..., Array], rows: int | None, arrays: Sequence[Array], axes: Sequence[int]
) -> Float[Array, "... N d"]:
    """`function(*arrays)`, so many rows at a time, and each block again for its gradient: so memory is bounded.

    Args:
      function: from some rows of the arrays to the same rows `[..., R, d]` of its result.
      rows: at a time; `None` computes all at once and keeps what the gradient needs.
      arrays: that have rows.
      axes: where each of them has its rows, counted from the end.
    """
    count = arrays[0].shape[axes[0]]
    if rows is None or rows >= count:
        return function(*arrays)
    blocks = math.ceil(count / rows)

    def cut(array: Array, axis: int) -> Array:
        axis += array.ndim
        widths = [(0, blocks * rows - count if i == axis else 0) for i in range(array.ndim)]
        shape = (*array.shape[:axis], blocks, rows, *array.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(array, widths).reshape(shape), axis, 0)

    block = jax.checkpoint(lambda parts: function(*parts))
    result = jnp.moveaxis(jax.lax.map(block, tuple(map(cut, arrays, axes))), 0, -3)  # [..., blocks, rows, d]
    return result.reshape(*result.shape[:-3], blocks * rows, result.shape[-1])[..., :count, :]


def mean_of_pairs(
    pairs: Float[Array, "... N N c"], mask: Bool[Array, "... N"] | None, axis: int
) -> Float[Array, "... R C c"]:
    """The mean over all targets (`axis` -2) or sources (-3) that are real, with the axis kept."""
    if mask is None:
        return jnp.mean(pairs, axis=axis, keepdims=True)
    real = jnp.expand_dims(mask, (-3 if axis == -2 else -2, -1))
    count = jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(pairs.dtype)
    return jnp.sum(jnp.where(real, pairs, 0), axis=axis, keepdims=True) / count[..., None, None, None]


def _flat(x: Array, axes: int) -> Array:
    """`x` with all but its last axes as one."""
    return x.reshape(-1, *x.shape[x.ndim - axes :])


class Kernel(nn.Module):
    """The matrix of a linear map without bias, named as in `Dense`, for those who compute with it otherwise."""

    features: int

    @nn.compact
    def __call__(self, inputs: int) -> Float[Array, "inputs features"]:
        """The matrix for inputs of so many features."""
        return self.param("kernel", nn.initializers.xavier_uniform(), (inputs, self.features), jnp.float32)


class AllPairs(NamedTuple):
    """Where a layer updates pairs: everywhere. Values of pairs, and of their ends, that broadcast to one another."""

    def pairs(self, pairs: Float[Array, "... N N c"]) -> tuple[Array, ...]:
        return (pairs,)

    def source(self, nodes: Float[Array, "... N d"]) -> tuple[Array, ...]:
        return (nodes[..., :, None, :],)

    def target(self, nodes: Float[Array, "... N d"]) -> tuple[Array, ...]:
        return (nodes[..., None, :, :],)


class EdgesAlone(NamedTuple):
    """Where a layer updates pairs: where there are edges, which are far fewer. Methods as those of `AllPairs`.

    Attributes:
      topology: of the graph.
      nodes: those that belong to it, without a class token.
    """

    topology: Topology
    nodes: slice

    def pairs(self, pairs: Float[Array, "... N N c"]) -> tuple[Array, ...]:
        return self.topology.from_pairs(pairs[..., self.nodes, self.nodes, :])

    def source(self, nodes: Float[Array, "... N d"]) -> tuple[Array, ...]:
        return self.topology.forward(self.topology.source(self._of_graph(nodes)))

    def target(self, nodes: Float[Array, "... N d"]) -> tuple[Array, ...]:
        return self.topology.forward(self.topology.target(self._of_graph(nodes)))

    def _of_graph(self, nodes: Array) -> Array:
        return self.topology.from_dense_nodes(nodes[..., self.nodes, :])


class TransformerLayer(nn.Module):
    """One post-norm layer. Attributes as in `NGT`."""

    node_features: int
    edge_features: int
    attention_features: int
    node_hidden: int
    edge_hidden: int
    edge_mlp_hidden: int
    num_heads: int
    modulate_values: bool
    dropout: float
    attention_rows: int | None
    attention_out: bool
    pair_means: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        nodes: Float[Array, "... N d"],
        pairs: Float[Array, "... N N c"],
        key_mask: Bool[Array, "... N"] | None,
        train: bool,
        updated: AllPairs | EdgesAlone | None,
    ) -> tuple[Float[Array, "... N d"], tuple[Array, ...]]:
        """New node features, and new features of the pairs that are updated."""

        def dense(features: int, name: str, use_bias: bool = True) -> Dense:
            init = nn.initializers.xavier_uniform()
            return Dense(features, use_bias, self.dtype, kernel_init=init, name=name)

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        drop = nn.Dropout(self.dropout, deterministic=not train)
        width, heads = self.attention_features, self.num_heads

        # Columns of both products stand head by head, and within a head part by part.
        qkv = dense(3 * width, "qkv_node", use_bias=False)(nodes).reshape(*nodes.shape[:-1], heads, 3, -1)
        queries, keys, values = (qkv[..., part, :].reshape(*nodes.shape[:-1], width) for part in range(3))
        parts = 4 if self.modulate_values else 3
        kernel = Kernel(parts * width, name="qkv_edge")(pairs.shape[-1]).astype(self.dtype)
        kernel = kernel.reshape(pairs.shape[-1], heads, parts, -1)
        columns = [kernel[:, :, part].reshape(pairs.shape[-1], width) for part in range(parts)]
        maps = AttentionMaps(*columns, *([] if self.modulate_values else [None]))
        pairs = pairs.astype(self.dtype)
        attention = in_row_blocks(
            lambda queries, pairs: relational_attention(queries, keys, values, pairs, maps, heads, key_mask),
            self.attention_rows,
            (queries, pairs),
            axes=(-2, -3),
        )
        if self.attention_out:
            attention = dense(self.node_features, "attention_out")(attention)
        nodes = norm("node_norm_0")(nodes + drop(dense(self.node_features, "node_lin")(attention)))
        hidden = dense(self.node_hidden, "node_mlp_0", use_bias=False)(nodes)
        hidden = dense(self.node_features, "node_mlp_1")(gelu(hidden))
        nodes = norm("node_norm_1")(nodes + drop(hidden))
        if updated is None:
            return nodes, ()

        edge_in, edge_out = dense(self.edge_hidden, "edge_in"), dense(self.edge_features, "edge_out")
        mlp = dense(self.edge_mlp_hidden, "edge_mlp_0", use_bias=False), dense(self.edge_features, "edge_mlp_1")
        norms = norm("edge_norm_0"), norm("edge_norm_1")
        of_source = dense(self.edge_hidden, "edge_source", use_bias=False)(nodes)
        of_target = dense(self.edge_hidden, "edge_target", use_bias=False)(nodes)
        if self.pair_means:
            from_source, to_target = (jnp.squeeze(mean_of_pairs(pairs, key_mask, axis), axis) for axis in (-2, -3))
            of_source = of_source + dense(self.edge_hidden, "edge_row", use_bias=False)(from_source)
            of_target = of_target + dense(self.edge_hidden, "edge_column", use_bias=False)(to_target)

        def update(pair: Array, reverse: Array, source: Array, target: Array) -> Array:
            hidden = edge_in(jnp.concatenate([pair, reverse], axis=-1)) + source + target
            pair = norms[0](pair + drop(edge_out(gelu(hidden))))
            return norms[1](pair + drop(mlp[1](gelu(mlp[0](pair)))))

        ends = updated.source(of_source), updated.target(of_target)
        both = updated.pairs(pairs), updated.pairs(jnp.swapaxes(pairs, -3, -2))
        return nodes, tuple(map(update, *both, *ends))


class NGT(nn.Module):
    """NG-T, from graph to graph.

    Looks at all pairs of nodes of a graph, and so costs the square of their number. Node features of the result are
    `[..., N, node_features]`, edge features `[..., E, 1, edge_features]` (in groups
    `[..., blocks, source, target, 1, edge_features]`); `globals.pairs` holds the features of all pairs and
    `globals.token` the class token.

    Attributes:
      node_features, edge_features: widths of nodes and pairs.
      attention_features: width of all heads together.
      node_hidden, edge_hidden: widths inside the perceptrons.
      edge_mlp_hidden: width inside the second perceptron of edges; `None` for `edge_hidden`.
      num_layers, num_heads: of the transformer.
      encoder: how weights become features.
      modulate_values: multiply node values by edges, besides adding edges to them.
      last_edge_update: update pairs in the last layer too; what reads edges (`ParamsReadout`, pooling over edges) needs
        it, what reads nodes alone does not. `"edges"` updates the pairs that are edges, and `globals.pairs` is `None`:
        the same edge features at less cost, for what reads no other pairs.
      class_token: add a node of its own, joined to no one, that a readout can take instead of pooling.
      dropout: rate on the branches.
      attention_out: map the heads' values once more before `node_lin`, without anything between the two.
      pair_means: edge updates also read the mean over all pairs with the same source and over those with the same
        target, as the learned optimizers of the paper do.
      alignment: `"reference"` reads nodes and pairs as if the class token did not stand before them, so that each gets
        what belongs to its neighbour, as the learned optimizers' PyTorch code does, which is then not equivariant.
      attention_rows: nodes whose attention is computed at a time, and again for the gradient; a few of them keep it in
        the cache of a CPU. `None` for all at once.
      memory_limit: most gigabytes that the activations of one graph and layer may take.
      dtype: of the computation; parameters are float32.
    """

    node_features: int = 64
    edge_features: int = 32
    attention_features: int = 128
    node_hidden: int = 128
    edge_hidden: int = 64
    edge_mlp_hidden: int | None = None
    num_layers: int = 4
    num_heads: int = 8
    encoder: EncoderConfig = EncoderConfig(reverse_edges=False)
    modulate_values: bool = True
    last_edge_update: bool | Literal["edges"] = True
    class_token: bool = False
    attention_out: bool = True
    pair_means: bool = False
    alignment: Literal["corrected", "reference"] = "corrected"
    dropout: float = 0.0
    attention_rows: int | None = None
    memory_limit: float = 8.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        graph: jraph.GraphsTuple | GroupedGraph,
        *,
        spec: NeuralGraphSpec | None = None,
        train: bool = False,
    ) -> jraph.GraphsTuple | GroupedGraph:
        """Runs over the edge list, or block by block where `spec` is given; both give the same numbers.

        Args:
          graph: a `jraph.GraphsTuple`, or with `spec` also a `GroupedGraph`; with `spec`, features may have any leading
            batch axes.
          spec: of the architecture, a static value.
          train: draw dropout masks, from the `dropout` random stream.

        Returns:
          A graph of the same type.

        Raises:
          ValueError: a graph of another architecture than `spec`, larger than the encoder's tables, or with so many
            nodes that pairs would take more memory than `memory_limit`; a width that the heads do not divide.
        """
        topology, raw_nodes, weights, _ = read_graph(graph, spec, reverse=self.encoder.reverse_edges)
        self.check_memory(topology.max_nodes)
        if self.attention_features % self.num_heads:
            raise ValueError(
                f"attention_features={self.attention_features} cannot be divided among num_heads={self.num_heads}"
            )
        encode = GraphEncoder(self.encoder, self.node_features, self.edge_features, self.dtype, name="encoder")
        flat_nodes, edges, non_edge, probes = encode(topology, raw_nodes, weights)
        nodes, pairs = topology.dense_nodes(flat_nodes), topology.pairs(edges, non_edge)
        key_mask = topology.dense_mask()
        if self.class_token:
            token = self.param("token", nn.initializers.normal(1.0), (self.node_features,), jnp.float32)
            first = jnp.broadcast_to(token.astype(self.dtype), (*nodes.shape[:-2], 1, self.node_features))
            nodes = jnp.concatenate([first, nodes], axis=-2)
            before = [(0, 0)] * (pairs.ndim - 3)
            pairs = jnp.pad(pairs, [*before, (1, 0), (1, 0), (0, 0)])
            if key_mask is not None:
                key_mask = jnp.pad(key_mask, [(0, 0), (1, 0)], constant_values=True)
        kept = slice(None)
        if self.class_token:
            kept = slice(1, None) if self.alignment == "corrected" else slice(None, -1)
        at_edges = EdgesAlone(topology, kept) if self.last_edge_update == "edges" else None
        new: Edges = ()
        for i in range(self.num_layers):
            layer = TransformerLayer(
                self.node_features,
                self.edge_features,
                self.attention_features,
                self.node_hidden,
                self.edge_hidden,
                self.edge_mlp_hidden or self.edge_hidden,
                self.num_heads,
                self.modulate_values,
                dropout=self.dropout,
                attention_rows=self.attention_rows,
                attention_out=self.attention_out,
                pair_means=self.pair_means,
                dtype=self.dtype,
                name=f"layer_{i}",
            )
            everywhere = i < self.num_layers - 1 or self.last_edge_update is True
            nodes, new = layer(nodes, pairs, key_mask, train, AllPairs() if everywhere else at_edges)
            if everywhere:
                (pairs,) = new
        updates: dict[str, Array] = {} if probes is None else {"probes": probes}
        if self.class_token:
            updates["token"] = nodes[..., 0, :]
        nodes, pairs = nodes[..., kept, :], pairs[..., kept, kept, :]
        if at_edges is None:
            updates["pairs"] = pairs
            new = topology.from_pairs(pairs)
        forward = tuple(edge[..., None, :] for edge in new)
        return topology.write(graph, topology.from_dense_nodes(nodes), forward, updates)

    def check_memory(self, num_nodes: int) -> None:
        """Raises a `ValueError` where pairs of a graph with so many nodes would take more than `memory_limit`."""
        num_nodes += self.class_token
        rows = min(num_nodes, self.attention_rows or num_nodes)
        hidden = 2 * self.edge_hidden + (self.edge_mlp_hidden or self.edge_hidden)
        numbers = num_nodes * (hidden + 2 * self.edge_features) + rows * 4 * self.attention_features
        gigabytes = num_nodes * numbers * jnp.dtype(self.dtype).itemsize / 1e9
        if gigabytes > self.memory_limit:
            raise ValueError(
                f"NG-T looks at all pairs of {num_nodes:,} nodes: about {gigabytes:,.1f} GB per graph and layer, more "
                f"than memory_limit={self.memory_limit:g}; use NG-GNN, linear in the weights, or raise the limit"
            )
