"""NFN: linear layers on weights that commute with permutations of neurons, with relu between them.

Zhou et al., "Permutation Equivariant Neural Functionals" (arXiv 2302.14040), have a map for each layer of one chain of
dense or convolutional layers. "Universal Neural Functionals" (Zhou et al., arXiv 2402.05232) derive such layers from
the permutations of any architecture, and are learned optimizers among other things. Here the permutations are those of
a `NeuralGraphSpec`, and the maps are shared by all layers, so that the same parameters fit networks of any depth, width
and connections. What tells layers apart are the features of their roles and depths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from ngjax.graph import GroupedGraph
from ngjax.nn import EncoderConfig
from ngjax.nn.encoder import GraphEncoder
from ngjax.nn.linear import Dense, at_least_float32
from ngjax.nn.topology import BlockTopology, Edges, read_graph
from ngjax.spec import NeuralGraphSpec

_EDGE_INPUTS = {"edge": 1, "edge_source": 4, "edge_target": 4, "edge_shared": 3}
"""What the map of an edge reads, in vectors: itself, at its source, at its target, and what all of its group share."""


def axis_mean(x: Float[Array, "..."], *axes: int) -> Float[Array, "..."]:
    """The mean over axes, which stay with length one; 0 where they are empty."""
    return jnp.sum(x, axis=axes, keepdims=True) / max(1, math.prod(x.shape[axis] for axis in axes))


def neighbourhood(topology: BlockTopology, nodes: Float[Array, "... N d"], edges: Edges) -> Float[Array, "... N 3*d"]:
    """`[own, mean over incoming edges, mean over outgoing edges]`: biases, row means and column means of a chain."""
    incoming = topology.sum(edges) / jnp.maximum(topology.degree(), 1).astype(nodes.dtype)
    outgoing = topology.sum(edges, outgoing=True) / jnp.maximum(topology.degree(outgoing=True), 1).astype(nodes.dtype)
    return jnp.concatenate([nodes, incoming, outgoing], axis=-1)


def network_mean(
    nodes: Sequence[Float[Array, "... 1 d"]], edges: Sequence[Float[Array, "... 1 1 1 d"]]
) -> Float[Array, "... 1 2*d"]:
    """The mean over all node groups of their means, and that over all edge groups of theirs.

    The published layers read the means of all layers, each with a map of its own; with shared maps this is left.
    """
    nodes_mean = sum(nodes[1:], nodes[0]) / len(nodes)
    edges_mean = sum(edges[1:], edges[0])[..., 0, 0, :, :] / len(edges)
    return jnp.concatenate([nodes_mean, edges_mean], axis=-1)


class NFNLayer(nn.Module):
    """The equivariant linear layer NFN-NP (Zhou et al. 2023, section 3.1), with maps shared by all layers.

    A bias becomes a linear map of itself, the means over its incoming and its outgoing edges, the mean of its node
    group, and the means of the network. A weight becomes one of itself, what its source and its target see (their
    biases and the means over their edges, so also those of the neighbouring groups), the means of its edge group over
    targets, over sources and over both, and the means of the network. All neurons are read as permutable, inputs and
    outputs too.

    Attributes:
      features: width of the result, of nodes and edges.
      dtype: of the computation; means are float32 or wider.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, topology: BlockTopology, nodes: Float[Array, "... N d"], edges: Edges
    ) -> tuple[Float[Array, "... N e"], Edges]:
        """New features of nodes, and of edges `[..., blocks, source, target, e]`."""
        wide = at_least_float32(self.dtype)
        nodes, edges = nodes.astype(wide), tuple(edge.astype(wide) for edge in edges)
        group_means = [axis_mean(nodes[..., place, :], -2) for place in topology.spec.node_slices.values()]
        over_sources = [axis_mean(edge, -3) for edge in edges]
        over_targets = [axis_mean(edge, -2) for edge in edges]
        over_both = [axis_mean(mean, -4, -2) for mean in over_sources]
        network = network_mean(group_means, over_both)
        seen = neighbourhood(topology, nodes, edges)

        sizes = [group.size for group in topology.spec.node_groups]
        of_group = jnp.concatenate([_repeat(x, n) for x, n in zip(group_means, sizes, strict=True)], axis=-2)
        inputs = [seen, of_group, _repeat(network, topology.spec.num_nodes)]
        new_nodes = Dense(self.features, dtype=self.dtype, name="node")(jnp.concatenate(inputs, axis=-1))

        # One linear map of all that an edge reads, taken apart: what edges share is multiplied once.
        own, source, target, shared = (self._part(name, width) for name, width in _EDGE_INPUTS.items())
        constant = network[..., None, None, :, :]
        new_edges = tuple(
            own(edge)
            + source(jnp.concatenate([of_source, row], axis=-1))
            + target(jnp.concatenate([of_target, column], axis=-1))
            + shared(jnp.concatenate([mean, constant], axis=-1))
            for edge, of_source, row, of_target, column, mean in zip(
                edges, topology.source(seen), over_targets, topology.target(seen), over_sources, over_both, strict=True
            )
        )
        return new_nodes, new_edges

    def _part(self, name: str, width: int) -> Dense:
        """The part of the map that reads `width` vectors, which starts as that of a whole one would."""
        scale = width / sum(_EDGE_INPUTS.values())
        init = nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")
        return Dense(self.features, use_bias=name == "edge", kernel_init=init, dtype=self.dtype, name=name)


class NFN(nn.Module):
    """`NFNLayer`s with relu between them, from graph to graph, on networks of any architecture.

    Results are those of `NGGNN`: node features `[..., N, features]`, edge features one vector per weight, for all
    positions of a kernel together, `[..., blocks, source, target, 1, features]`.

    What the published layers have and these do not: maps for each layer and inputs and outputs in their own order
    (NFN-HNP), for which the encoder's depth features stand; maps between distant layers, but for the mean over the
    network; and, of the universal form, what only axes have that are permuted together (diagonals of square weights).

    Attributes:
      features: width of nodes and edges.
      num_layers: equivariant layers.
      encoder: how weights become features; without reverse edges.
      dtype: of the computation; parameters are float32.
    """

    features: int = 32
    num_layers: int = 3
    encoder: EncoderConfig = EncoderConfig(reverse_edges=False, positions="depth")
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        graph: jraph.GraphsTuple | GroupedGraph,
        *,
        spec: NeuralGraphSpec | None = None,
        train: bool = False,
    ) -> jraph.GraphsTuple | GroupedGraph:
        """Runs block by block.

        Args:
          graph: a `GroupedGraph` or `jraph.GraphsTuple`, whose features may have any leading batch axes.
          spec: of the architecture, a static value. It has to be given.
          train: changes nothing; other backbones draw dropout masks.

        Returns:
          A graph of the same type.

        Raises:
          ValueError: no spec, an encoder with reverse edges, or a graph of another architecture than `spec`.
        """
        del train
        if spec is None:
            raise ValueError("argument spec is missing: means over layers need NFN()(graph, spec=spec)")
        if self.encoder.reverse_edges:
            raise ValueError("encoder: expected reverse_edges=False, as edges of NFN are read from both ends")
        topology, nodes, weights, _ = read_graph(graph, spec, reverse=False)
        assert isinstance(topology, BlockTopology)
        encode = GraphEncoder(self.encoder, self.features, self.features, self.dtype, name="encoder")
        nodes, edges, _, probes = encode(topology, nodes, weights)
        for i in range(self.num_layers):
            if i > 0:
                nodes, edges = nn.relu(nodes), tuple(map(nn.relu, edges))
            nodes, edges = NFNLayer(self.features, self.dtype, name=f"layer_{i}")(topology, nodes, edges)
        each = tuple(edge[..., None, :] for edge in edges)
        return topology.write(graph, nodes, each, {} if probes is None else {"probes": probes})


def _repeat(x: Float[Array, "... 1 d"], count: int) -> Float[Array, "... {count} d"]:
    return jnp.broadcast_to(x, (*x.shape[:-2], count, x.shape[-1]))
