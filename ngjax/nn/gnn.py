"""NG-GNN: principal neighbourhood aggregation with edge updates (Kofinas et al. 2024, section 3.2).

Differences from PNA (Corso et al. 2020): edge features modulate the messages (FiLM), and edges are updated from their
ends after each layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from ngjax.graph import GroupedGraph
from ngjax.nn.encoder import EncoderConfig, GraphEncoder
from ngjax.nn.linear import DeclareLinearMap, Dense, LinearMap, at_least_float32
from ngjax.nn.topology import Edges, Scope, Topology, read_graph
from ngjax.spec import NeuralGraphSpec

_STD_FLOOR = 1e-5  # of the variance of messages; a node with no or one incoming edge has its root as deviation
_NORM_EPSILON = 1e-5  # added to the deviation of node features


def aggregate(topology: Topology, messages: Edges, mean_log_degree: float | Array) -> Float[Array, "... N D"]:
    """Mean, min, max and standard deviation of incoming messages, as they are and scaled by the log of the degree.

    Corso et al. (2020), equations 5 and 8. The deviation is taken in two passes, which keeps it accurate for messages
    far from zero. Nodes without incoming edges get zeros and the floor of the deviation.
    """
    degree = topology.degree().astype(messages[0].dtype)
    count = jnp.maximum(degree, 1)
    mean = topology.sum(messages) / count
    deviations = tuple((m - c) ** 2 for m, c in zip(messages, topology.target(mean), strict=True))
    variance = topology.sum(deviations) / count
    std = jnp.sqrt(jnp.maximum(variance, _STD_FLOOR))
    plain = jnp.concatenate([mean, topology.min(messages), topology.max(messages), std], axis=-1)
    return jnp.concatenate([plain, plain * (jnp.log(degree + 1) / mean_log_degree)], axis=-1)


def graph_norm(topology: Topology, nodes: Float[Array, "... N d"], scope: Scope) -> Float[Array, "... N d"]:
    """Node features centred and divided by their deviation over all nodes and channels of a graph, in two passes.

    Padding becomes zero: it has no deviation, and would grow from layer to layer until gradients are NaN.
    """
    centred = topology.mask_nodes(nodes - topology.node_mean(nodes, scope))
    variance = topology.node_mean(centred**2, scope)
    # The maximum keeps the derivative of the root finite where all features are equal.
    return centred / (jnp.sqrt(jnp.maximum(variance, 1e-20)) + _NORM_EPSILON)


class LazyEdges(NamedTuple):
    """Edge features that are a linear map of others.

    They are read by linear maps alone, with which this one is joined: a product less for every edge and layer.

    Attributes:
      inner: features of each edge group.
      out: the map that is still to be made; `None` for none.
    """

    inner: Edges
    out: LinearMap | None = None


class PNALayer(nn.Module):
    """One round of messages. `features` is the width of nodes and edges."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, topology: Topology, nodes: Float[Array, "... N d"], edges: LazyEdges, mean_log_degree: float | Array
    ) -> Float[Array, "... N d"]:
        """New node features."""
        film = DeclareLinearMap(2 * self.features, name="film")(self.features).after(edges.out)
        # One linear map of [target, source], taken apart: on nodes rather than on edges.
        of_target = topology.target(Dense(self.features, dtype=self.dtype, name="message_target")(nodes))
        of_source = topology.source(
            Dense(self.features, use_bias=False, dtype=self.dtype, name="message_source")(nodes)
        )

        def message(edge: Array, target: Array, source: Array) -> Array:
            scale, shift = jnp.split(film(edge, self.dtype), 2, axis=-1)
            return scale * (target + source) + shift

        messages = tuple(map(message, edges.inner, of_target, of_source))
        wide = at_least_float32(self.dtype)
        incoming = aggregate(topology, tuple(m.astype(wide) for m in messages), mean_log_degree)
        update = Dense(self.features, dtype=self.dtype, name="update")
        mixed = update(jnp.concatenate([nodes.astype(wide), incoming], axis=-1))
        return Dense(self.features, dtype=self.dtype, name="mix")(mixed)


class EdgeUpdate(nn.Module):
    """New edge features from the edge and its two ends."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, topology: Topology, nodes: Float[Array, "... N d"], edges: LazyEdges) -> LazyEdges:
        of_edge = DeclareLinearMap(self.features, name="edge")(self.features).after(edges.out)
        out = DeclareLinearMap(self.features, name="out")(self.features)
        of_source = topology.source(Dense(self.features, use_bias=False, dtype=self.dtype, name="source")(nodes))
        of_target = topology.target(Dense(self.features, use_bias=False, dtype=self.dtype, name="target")(nodes))
        inner = tuple(
            nn.silu(of_edge(edge, self.dtype) + source + target)
            for edge, source, target in zip(edges.inner, of_source, of_target, strict=True)
        )
        return LazyEdges(inner, out)


class NGGNN(nn.Module):
    """NG-GNN, from graph to graph.

    Node features of the result are `[..., N, features]`; edge features, one vector per weight, `[..., E, 1, features]`
    in an edge list and `[..., blocks, source, target, 1, features]` in groups.

    Attributes:
      features: width of nodes and edges.
      num_layers: rounds of messages; edges are updated after all but the last.
      encoder: how weights become features.
      dropout: rate on node features between layers.
      norm_scope: statistics of node features are those of each network (`"graph"`), or joint over everything in the
        batch (`"batch"`), as in the PyTorch implementation of the paper, where outputs depend on batch mates.
      mean_log_degree: the mean of `log(degree + 1)` over a training set that degrees are compared with; `None` takes
        each network's own.
      dtype: of the computation; parameters are float32.
    """

    features: int = 32
    num_layers: int = 4
    encoder: EncoderConfig = EncoderConfig()
    dropout: float = 0.0
    norm_scope: Scope = "graph"
    mean_log_degree: float | None = None
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
          ValueError: a graph of another architecture than `spec`, or larger than the encoder's tables.
        """
        topology, nodes, weights, _ = read_graph(graph, spec, reverse=self.encoder.reverse_edges)
        encode = GraphEncoder(self.encoder, self.features, self.features, self.dtype, name="encoder")
        nodes, encoded, _, probes = encode(topology, nodes, weights)
        edges = LazyEdges(encoded)
        mean_log_degree: float | Array | None = self.mean_log_degree
        if mean_log_degree is None:
            # Above zero, so that padding and networks without edges divide zero by something.
            mean_log_degree = jnp.maximum(topology.node_mean(jnp.log(topology.degree() + 1)), 1e-6)
        for i in range(self.num_layers):
            layer = PNALayer(self.features, self.dtype, name=f"layer_{i}")
            nodes = layer(topology, nodes, edges, mean_log_degree)
            if i == self.num_layers - 1:
                break
            scale = self.param(f"norm_scale_{i}", nn.initializers.ones, (self.features,), jnp.float32)
            shift = self.param(f"norm_bias_{i}", nn.initializers.zeros, (self.features,), jnp.float32)
            nodes = graph_norm(topology, nodes.astype(at_least_float32(nodes.dtype)), self.norm_scope)
            nodes = nn.silu((nodes * scale + shift).astype(self.dtype))
            nodes = nn.Dropout(self.dropout, deterministic=not train)(nodes)
            edges = EdgeUpdate(self.features, self.dtype, name=f"edge_update_{i}")(topology, nodes, edges)
        forward = topology.forward(edges.inner)
        if edges.out is not None:
            forward = tuple(edges.out(edge, self.dtype) for edge in forward)
        forward = tuple(edge[..., None, :] for edge in forward)
        return topology.write(graph, nodes, forward, {} if probes is None else {"probes": probes})
