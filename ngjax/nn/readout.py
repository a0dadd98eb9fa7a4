"""From processed graphs to answers: one vector per network, or one number per parameter."""

from __future__ import annotations

import math
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import jraph
from jaxtyping import Array, Float

from ngjax.graph import GlobalData, GroupedGraph
from ngjax.nn.encoder import WeightStatistics, destandardize, kernel_index, per_layer
from ngjax.nn.linear import Dense
from ngjax.nn.topology import BlockTopology, Edges, Topology, extreme, read_graph
from ngjax.spec import NeuralGraphSpec

Pooling = Literal["cat_output", "mean_output", "max_output", "mean", "max", "mean_edge", "max_edge", "token"]
POOLINGS: tuple[str, ...] = Pooling.__args__  # type: ignore[attr-defined]


def pool(
    topology: Topology,
    nodes: Float[Array, "... N d"],
    edges: Edges,
    globals_: GlobalData,
    pooling: str,
    num_outputs: int | None,
) -> Float[Array, "... D"]:
    """One vector per graph.

    `cat_output` puts the output nodes one after the other, `mean_output` and `max_output` pool them; `mean` and `max`
    pool all nodes; `mean_edge` and `max_edge` pool all ordered pairs of nodes (pairs without an edge are zero after
    NG-GNN); `token` takes NG-T's class token.

    Raises:
      ValueError: an unknown pooling, or `token` where there is none.
    """
    if pooling == "token":
        if globals_.token is None:
            raise ValueError("pooling 'token' needs a model with class_token=True")
        return globals_.token
    if pooling in ("mean", "max"):
        return topology.pool_nodes(nodes, jnp.mean if pooling == "mean" else jnp.max)
    if pooling in ("mean_edge", "max_edge"):
        return _pool_pairs(topology, edges, globals_, pooling)
    if pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}; known are {', '.join(POOLINGS)}")
    outputs = topology.output_nodes(nodes, num_outputs)
    if pooling == "cat_output":
        return outputs.reshape(*outputs.shape[:-2], -1)
    return jnp.mean(outputs, axis=-2) if pooling == "mean_output" else extreme(jnp.max, outputs, -2)


def _pool_pairs(topology: Topology, edges: Edges, globals_: GlobalData, pooling: str) -> Float[Array, "... d"]:
    pairs = globals_.pairs
    if pairs is None:
        edges = tuple(edge[..., 0, :] for edge in edges)
        pairs = topology.pairs(edges, jnp.zeros(edges[0].shape[-1], edges[0].dtype))
    mask = topology.dense_mask()
    if mask is None:
        return jnp.mean(pairs, axis=(-3, -2)) if pooling == "mean_edge" else extreme(jnp.max, pairs, (-3, -2))
    both = (mask[..., :, None] & mask[..., None, :])[..., None]
    if pooling == "mean_edge":
        count = jnp.maximum(jnp.sum(both.astype(pairs.dtype), axis=(-3, -2)), 1)
        return jnp.sum(jnp.where(both, pairs, 0), axis=(-3, -2)) / count
    greatest = extreme(jnp.max, jnp.where(both, pairs, -jnp.inf), (-3, -2))
    return jnp.where(jnp.any(mask, axis=-1)[..., None], greatest, 0)  # padding graphs have no pairs


class GraphReadout(nn.Module):
    """One vector per network: pooling and a perceptron. The result is `[..., features]`, in edge lists `[G, features]`.

    Attributes:
      features: width of the result (classes, predicted numbers).
      hidden: width inside the perceptron.
      num_hidden: hidden layers of the perceptron.
      pooling: see `pool`.
      num_outputs: output neurons of the networks, which an edge list needs for the `_output` poolings.
      layer_norm: normalize what was pooled. Nodes after the last layer differ little between networks at
        initialization; normalized, logits start with order one and training starts at once.
      probe_outputs: also read the networks' own outputs at the probe inputs directly.
      dropout: rate before each linear map but the first.
      dtype: of the computation; parameters are float32.
    """

    features: int = 10
    hidden: int = 64
    num_hidden: int = 2
    pooling: Pooling = "cat_output"
    num_outputs: int | None = None
    layer_norm: bool = True
    probe_outputs: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        graph: jraph.GraphsTuple | GroupedGraph,
        *,
        spec: NeuralGraphSpec | None = None,
        train: bool = False,
    ) -> Float[Array, "... features"]:
        """Reads the output of a model.

        Args:
          graph: what the model returned.
          spec: as for the model.
          train: draw dropout masks, from the `dropout` random stream.

        Raises:
          ValueError: `probe_outputs` where the model has no probes; see also `pool`.
        """
        topology, nodes, edges, globals_ = read_graph(graph, spec, reverse=False)
        x = pool(topology, nodes, edges, globals_, self.pooling, self.num_outputs)
        if self.layer_norm:
            x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        if self.probe_outputs:
            if globals_.probes is None:
                raise ValueError("probe_outputs=True needs a model whose encoder has num_probes > 0")
            outputs = topology.output_nodes(topology.mask_nodes(globals_.probes), self.num_outputs)
            x = jnp.concatenate([x, outputs.reshape(*outputs.shape[:-2], -1).astype(x.dtype)], axis=-1)
        for i in range(self.num_hidden):
            x = nn.relu(Dense(self.hidden, dtype=self.dtype, name=f"dense_{i}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Dense(self.features, dtype=self.dtype, name=f"dense_{self.num_hidden}")(x)


class ParamsReadout(nn.Module):
    """One number (or `features` numbers) per parameter, as a graph that `to_params` turns into a pytree.

    Attributes:
      features: numbers per parameter.
      statistics: outputs are multiplied by these deviations and shifted by these means, layer by layer, as if they were
        standardized weights; `None` leaves them as they are.
      output_scale: initial value of a learned factor per layer for weights and one for biases; `None` for none.
      max_layers: layers with factors of their own.
      bias_alignment: `"reference"` reads biases from nodes that stand as many places too early as the network has
        inputs, as the PyTorch implementation of the paper does in its NG-GNN editor, which is then not equivariant;
        needs a spec. For checkpoints trained that way.
      kernel_range: kernel positions with maps of their own; see `EncoderConfig`.
      dtype: of the computation; parameters are float32.
    """

    features: int = 1
    statistics: WeightStatistics | None = None
    output_scale: float | None = 0.01
    max_layers: int = 9
    bias_alignment: Literal["corrected", "reference"] = "corrected"
    kernel_range: tuple[int, int, int] = (1, 1, 1)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        graph: jraph.GraphsTuple | GroupedGraph,
        *,
        spec: NeuralGraphSpec | None = None,
        train: bool = False,
    ) -> jraph.GraphsTuple | GroupedGraph:
        """Reads the output of a model into a graph of per-parameter values; input nodes and padding are zero.

        Args:
          graph: what the model returned.
          spec: as for the model.
          train: not used; readouts share one signature.

        Raises:
          ValueError: the network is deeper than `max_layers`, or an alignment that needs a spec has none.
        """
        del train
        topology, nodes, edges, _ = read_graph(graph, spec, reverse=False)
        hidden = Dense(nodes.shape[-1], dtype=self.dtype, name="node_dense_0")(nodes)
        nodes = Dense(self.features, dtype=self.dtype, name="node_dense_1")(nn.relu(hidden))
        if self.bias_alignment == "reference":
            if not isinstance(topology, BlockTopology):
                raise ValueError("bias_alignment='reference' needs spec=")
            nodes = jnp.roll(nodes, topology.spec.num_positions("input"), axis=-2)
        edges = self._edge_head(topology, edges)
        if self.statistics is not None:
            nodes, edges = destandardize(topology, nodes, edges, self.statistics)
        if self.output_scale is not None:
            nodes, edges = self._scale(topology, nodes, edges, self.output_scale)
        has_parameter = topology.by_node("level")[:, None] > 0
        nodes = topology.mask_nodes(jnp.where(has_parameter, nodes, 0))
        return topology.write(graph, nodes, topology.mask_edges(edges), {})

    def _edge_head(self, topology: Topology, edges: Edges) -> Edges:
        """`[..., 1, d]` to `[..., K, features]`, with one map per kernel offset."""
        width = edges[0].shape[-1]
        dense = Dense(width, dtype=self.dtype, name="edge_dense_0")
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)
        positions = math.prod(self.kernel_range)
        kernel = self.param("edge_kernel", init, (positions, width, self.features), jnp.float32)
        bias = self.param("edge_bias", nn.initializers.zeros, (positions, self.features), jnp.float32)
        kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)

        def head(edge: Array, grid: tuple[int, int, int]) -> Array:
            rows = kernel_index(grid, self.kernel_range)
            return jnp.einsum("...d,kdf->...kf", nn.relu(dense(edge[..., 0, :])), kernel[rows]) + bias[rows]

        return tuple(head(e, grid) for e, grid in zip(edges, topology.kernel_grids(), strict=True))

    def _scale(self, topology: Topology, nodes: Array, edges: Edges, initial: float) -> tuple[Array, Edges]:
        topology.check_levels(self.max_layers, "the readout has factors")
        init = nn.initializers.constant(initial)
        weight = self.param("weight_scale", init, (self.max_layers,), jnp.float32)
        bias = self.param("bias_scale", init, (self.max_layers,), jnp.float32)
        nodes = nodes * per_layer(bias, self.dtype)(topology.by_node("level"))[..., 0]
        look_up = per_layer(weight, self.dtype)
        return nodes, tuple(e * look_up(of) for e, of in zip(edges, topology.edge_levels(), strict=True))


class WeightSpaceModel(nn.Module):
    """A backbone (`NGGNN`, `NGT`) and a readout (`GraphReadout`, `ParamsReadout`) as one module."""

    backbone: nn.Module
    readout: nn.Module

    def __call__(
        self,
        graph: jraph.GraphsTuple | GroupedGraph,
        *,
        spec: NeuralGraphSpec | None = None,
        train: bool = False,
    ) -> Any:
        """The readout of the backbone's output; arguments are those of the two."""
        return self.readout(self.backbone(graph, spec=spec, train=train), spec=spec, train=train)
