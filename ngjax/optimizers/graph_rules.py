"""Update rules that read the network as a graph.

On NG-GNN and NG-T they are those of Kofinas et al. (2024), section 4.3; NFN, as a backbone of the same rule, is what
they are compared with.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ngjax.baselines import NFN
from ngjax.graph import GlobalData, GroupedGraph, to_groups, to_params
from ngjax.nn import NGGNN, NGT
from ngjax.nn.linear import Dense
from ngjax.optimizers.features import MOMENTUM_DECAYS, SCALAR_FEATURES, FeatureSet
from ngjax.optimizers.heads import UpdateHead
from ngjax.spec import NeuralGraphSpec


def with_constant_edges(spec: NeuralGraphSpec, graph: GroupedGraph, reads: FeatureSet) -> GroupedGraph:
    """Features of edges without a parameter (residual connections): those of a weight that never has a gradient."""
    edges = list(graph.edges)
    for i, group in enumerate(spec.edge_groups):
        if group.view is None:
            weight, zero = jnp.float32(group.constant), jnp.float32(0)
            edges[i] = jnp.broadcast_to(reads.of(weight, zero, [zero] * len(MOMENTUM_DECAYS)), edges[i].shape)
    return graph._replace(edges=tuple(edges))


class GraphRule(nn.Module):
    """The perceptron on the features of each scalar and on what a graph model says of its edge or node.

    A kernel is one edge: its scalars share what the model says. Scalars without a place in the graph get a learned
    vector instead.

    Attributes:
      backbone: an `NGGNN`, `NGT` or `NFN`, whose nodes and edges are equally wide.
      width: of the hidden layers of the perceptron and of the readout.
      num_hidden: hidden layers of the perceptron.
      readout_hidden: hidden layers between the backbone and the perceptron.
      shared_readout: the same readout for nodes and edges.
      bias_alignment: `"reference"` reads biases from nodes that stand as many places too early as the network has
        inputs, as the PyTorch code of the paper's optimizer does with NG-GNN, which is then not equivariant.
      reads: the features.
      dtype: of the perceptron's computation; that of the backbone is its own.
      chunk: scalars that the perceptron sees at a time.
    """

    backbone: NGGNN | NGT | NFN
    width: int
    num_hidden: int
    readout_hidden: int = 1
    shared_readout: bool = False
    bias_alignment: Literal["corrected", "reference"] = "corrected"
    reads: FeatureSet = SCALAR_FEATURES
    dtype: Any = jnp.float32
    chunk: int | None = None

    @nn.compact
    def __call__(
        self, features: Sequence[Float[Array, "..."]], spec: NeuralGraphSpec | None
    ) -> tuple[Float[Array, "..."], ...]:
        """`[*shape, C]` to `[*shape, 2]` for every tensor.

        Args:
          features: of the tensors, in the order of the spec.
          spec: of the list of tensors; `None` where nothing is known of them.
        """
        head = UpdateHead(self.width, self.num_hidden, self.dtype, self.chunk, name="head")
        loose = self.param("loose", nn.initializers.zeros, (self.width,), jnp.float32)
        if spec is None:
            return tuple(head(f, loose) for f in features)
        graph = with_constant_edges(spec, to_groups(spec, list(features), feature_axis=True), self.reads)
        no_edges: tuple[Array, ...] = ()
        nodes, edges = self._read(graph, spec) if graph.edges else (loose, no_edges)
        heads = GroupedGraph(
            head(graph.nodes, nodes),
            tuple(head(f, e) for f, e in zip(graph.edges, edges, strict=True)),
            GlobalData(loose=head(graph.globals.loose, loose)),
        )
        return tuple(to_params(spec, heads, feature_axis=True))

    def _read(self, graph: GroupedGraph, spec: NeuralGraphSpec) -> tuple[Array, tuple[Array, ...]]:
        """What the backbone says of nodes `[N, width]` and of edges `[blocks, source, target, 1, width]`."""
        kinds = ("", "") if self.shared_readout else ("node_", "edge_")

        @functools.cache
        def layers(kind: str) -> list[Dense]:
            names = [f"{kind}readout_{i}" for i in range(self.readout_hidden + 1)]
            return [Dense(self.width, dtype=self.dtype, name=name) for name in names]

        def read(kind: str, x: Array) -> Array:
            first, *rest = layers(kind)
            x = first(x)
            for layer in rest:
                x = layer(nn.relu(x))
            return x

        out = self.backbone(graph, spec=spec)
        nodes = read(kinds[0], out.nodes)
        if self.bias_alignment == "reference":
            nodes = jnp.roll(nodes, spec.num_positions("input"), axis=-2)
        return nodes, tuple(read(kinds[1], edge) for edge in out.edges)
