"""From raw weights to node and edge features: the constructor of Kofinas et al. (2024), section 3 and appendix C."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ngjax.actions import orbits
from ngjax.graph import GroupedGraph, to_groups
from ngjax.nn.linear import Dense, at_least_float32
from ngjax.nn.probes import ProbeEncoder, probe_values
from ngjax.nn.topology import BlockTopology, Edges, Topology
from ngjax.spec import ROLES, NeuralGraphSpec
from ngjax.trig import sincos

_DEPTH_WAVES = 4


class WeightStatistics(NamedTuple):
    """Mean and deviation of a zoo's weights and biases, one number per layer (level of the target minus one)."""

    weight_mean: tuple[float, ...]
    weight_std: tuple[float, ...]
    bias_mean: tuple[float, ...]
    bias_std: tuple[float, ...]


def weight_statistics(spec: NeuralGraphSpec, params: Any) -> WeightStatistics:
    """Statistics of networks of one architecture, stacked along leading axes.

    Layers without a bias get mean 0 and standard deviation 1, so that nothing is divided by zero.

    Raises:
      ValueError: the leaves are not those of the spec.
    """
    grouped: GroupedGraph = to_groups(spec, params)
    weights: list[list[np.ndarray]] = [[] for _ in range(spec.max_level)]
    biases: list[list[np.ndarray]] = [[] for _ in range(spec.max_level)]
    for group, array in zip(spec.edge_groups, grouped.edges, strict=True):
        if group.view is not None:
            weights[spec.node_group[group.target].level - 1].append(np.asarray(array).ravel())
    for node_group in spec.node_groups:
        if node_group.bias is not None:
            place = spec.node_slices[node_group.name]
            biases[node_group.level - 1].append(np.asarray(grouped.nodes[..., place, :]).ravel())

    def moments(parts: list[np.ndarray]) -> tuple[float, float]:
        if not parts:
            return 0.0, 1.0
        values = np.concatenate(parts).astype(np.float64)
        return float(values.mean()), float(values.std()) or 1.0

    weight_mean, weight_std = zip(*map(moments, weights), strict=True)
    bias_mean, bias_std = zip(*map(moments, biases), strict=True)
    return WeightStatistics(weight_mean, weight_std, bias_mean, bias_std)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """How raw weights become features.

    Attributes:
      reverse_edges: each weight is also an edge from its target to its source, and edge features are
        `[forward, backward, both]`.
      statistics: weights are standardized with them; `None` leaves them as they are.
      fourier_frequencies: number of random frequencies of Gaussian Fourier features (Tancik et al. 2020), 0 for none.
      fourier_scale: their standard deviation.
      depth: linear maps in the first projection.
      num_probes: learned inputs the network itself is run on; its neurons' values become node features.
      zero_biases, zero_weights: leave biases or weights out of the features.
      positions: what is added to the nodes to tell layers apart. `"slot"`: a row of a table for each input, each hidden
        layer and each output, as in the paper. `"depth"`: a linear map of the role (input, hidden, output) and of waves
        of the relative depth, which means the same in networks of any size and depth. `"none"`: nothing.
      max_inputs, max_hidden_layers, max_outputs: rows of the position table.
      kernel_range: kernel positions with maps of their own, around the centre; those beyond share the outermost.
    """

    reverse_edges: bool = True
    statistics: WeightStatistics | None = None
    fourier_frequencies: int = 0
    fourier_scale: float = 3.0
    depth: int = 1
    num_probes: int = 0
    zero_biases: bool = False
    zero_weights: bool = False
    positions: Literal["slot", "depth", "none"] = "slot"
    max_inputs: int = 16
    max_hidden_layers: int = 8
    max_outputs: int = 16
    kernel_range: tuple[int, int, int] = (1, 1, 1)


def kernel_index(grid: Sequence[int], kernel_range: Sequence[int]) -> np.ndarray:
    """Rows `[K]` of a table over `kernel_range` for the positions of a kernel grid, by offset from the centre."""
    axes = [np.clip(np.arange(k) - k // 2 + r // 2, 0, r - 1) for k, r in zip(grid, kernel_range, strict=True)]
    return np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), tuple(kernel_range)).reshape(-1)


def directed(table: Float[Array, "K c m"], channels: int, backward: bool) -> Float[Array, "K C m"]:
    """The part of a linear map of `[forward, backward, both]` channels that one direction's weight meets.

    The features of a forward edge are `[w, 0, w]` and those of its reverse `[0, w, w]`, so the map of one number is
    the sum of two, and the zeros need never be written.
    """
    own = table[:, channels : 2 * channels] if backward else table[:, :channels]
    return own + table[:, 2 * channels :]


class KernelDense(nn.Module):
    """A linear map of `[..., K, C]` to `[..., features]`, with one matrix per kernel offset.

    Attributes:
      features: width of the result.
      kernel_range: offsets with a matrix of their own.
      reverse: the matrices are for `[forward, backward, both]` channels; see `directed`.
      dtype: of the computation.
    """

    features: int
    kernel_range: tuple[int, int, int] = (1, 1, 1)
    reverse: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "... K C"], grid: tuple[int, int, int] = (1, 1, 1), backward: bool = False
    ) -> Float[Array, "... D"]:
        positions, channels = math.prod(self.kernel_range), x.shape[-1]
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=2)
        shape = (positions, channels * (3 if self.reverse else 1), self.features)
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        if self.reverse:
            kernel = directed(kernel, channels, backward)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        kernel = kernel[kernel_index(grid, self.kernel_range)]
        if x.shape[-2:] == (1, 1):
            return x[..., 0, :] * kernel[0, 0] + bias
        flat = x.reshape(-1, x.shape[-2] * channels) @ kernel.reshape(-1, self.features)
        return flat.reshape(*x.shape[:-2], self.features) + bias


def fourier_features(x: Float[Array, "... K C"], frequencies: Float[Array, "K C m"]) -> Float[Array, "... 1 M"]:
    """`[cos(2 pi B x), sin(2 pi B x)]`, cosines first (Tancik et al. 2020, section 4)."""
    # In turns: the whole turns are dropped before the multiplication by 2 pi, exactly.
    if x.shape[-2:] == (1, 1):
        turns = x * frequencies[0, 0]
    else:
        turns = jnp.einsum("...kc,kcm->...m", x, frequencies, precision="highest")[..., None, :]
    sin, cos = sincos(2 * math.pi * (turns - jnp.round(turns)))
    return jnp.concatenate([cos, sin], axis=-1)


def depth_features(topology: Topology) -> Float[Array, "N 7"]:
    """Role (input, hidden, output), one number each, and `cos(k pi t)` of the relative depth `t`, k from 1 to 4."""
    role = jax.nn.one_hot(topology.by_node("role"), len(ROLES))
    waves = jnp.cos(jnp.pi * topology.relative_depth() * jnp.arange(1.0, _DEPTH_WAVES + 1.0))
    return jnp.concatenate([role, waves], axis=-1)


class GraphEncoder(nn.Module):
    """Node and edge features from raw biases and weights.

    Attributes:
      config: what goes in.
      node_features, edge_features: widths of the result.
      dtype: of the computation; Fourier phases and statistics are always float32 or wider.
    """

    config: EncoderConfig
    node_features: int
    edge_features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, topology: Topology, nodes: Float[Array, "... N F"], edges: Edges
    ) -> tuple[Float[Array, "... N d"], Edges, Float[Array, " c"], Float[Array, "... N P"] | None]:
        """Features of nodes, of edges (backward ones last) and of a non-edge, and the probe values."""
        config = self.config
        fits = self._fits_tables(topology) if config.positions == "slot" or config.num_probes else None
        probes = None
        if config.num_probes:
            probes = self._probe_values(topology, nodes, edges)
        if config.statistics is not None:
            nodes, edges = standardize(topology, nodes, edges, config.statistics)
        grids = topology.kernel_grids()
        project_nodes = self._projection("node", self.node_features, nodes.shape[-1], (1, 1, 1), reverse=False)
        project_edges = self._projection(
            "edge", self.edge_features, edges[0].shape[-1], config.kernel_range, config.reverse_edges
        )
        node_map = Dense(self.node_features, dtype=self.dtype, name="node_out")
        edge_map = Dense(self.edge_features, dtype=self.dtype, name="edge_out")

        if config.zero_biases:
            node_values = jnp.zeros((*nodes.shape[:-1], self.node_features), self.dtype)
        else:
            node_values = project_nodes(nodes[..., None, :], (1, 1, 1))
        if probes is not None:
            node_values = node_values + ProbeEncoder(
                self.node_features, config.max_hidden_layers, self.dtype, name="probes"
            )(topology, probes)
        node_values = node_map(node_values)
        if config.positions == "slot":
            node_values = node_values + self._positions(topology)
        elif config.positions == "depth":
            place = Dense(self.node_features, use_bias=False, dtype=self.dtype, name="depth")
            node_values = node_values + place(depth_features(topology))
        if fits is not None:
            node_values = jnp.where(fits, node_values, jnp.nan)

        def encode_edges(x: Array, grid: tuple[int, int, int], backward: bool = False) -> Array:
            if config.zero_weights:
                return edge_map(jnp.zeros((*x.shape[:-2], self.edge_features), self.dtype))
            return edge_map(project_edges(x, grid, backward))

        edge_values = tuple(encode_edges(e, grid) for e, grid in zip(edges, grids, strict=True))
        if config.reverse_edges:
            back = tuple(encode_edges(e, grid, backward=True) for e, grid in zip(edges, grids, strict=True))
            edge_values = topology.join(edge_values, back)
        non_edge = encode_edges(jnp.zeros((1, 1, edges[0].shape[-1]), nodes.dtype), (1, 1, 1))[0]
        return topology.mask_nodes(node_values), edge_values, non_edge, probes

    def _projection(
        self, kind: str, width: int, channels: int, kernel_range: tuple[int, int, int], reverse: bool
    ) -> Callable[..., Array]:
        config = self.config
        has_fourier = config.fourier_frequencies > 0
        first = KernelDense(
            width,
            kernel_range=(1, 1, 1) if has_fourier else kernel_range,
            reverse=reverse and not has_fourier,
            dtype=self.dtype,
            name=f"{kind}_in_0",
        )
        rest = [Dense(width, dtype=self.dtype, name=f"{kind}_in_{i}") for i in range(1, config.depth)]
        frequencies = None
        if has_fourier:
            shape = (math.prod(kernel_range), channels * (3 if reverse else 1), config.fourier_frequencies)
            frequencies = self.variable(
                "constants",
                f"{kind}_frequencies",
                lambda: config.fourier_scale * jax.random.normal(self.make_rng("params"), shape),
            ).value

        def project(x: Array, grid: tuple[int, int, int], backward: bool = False) -> Array:
            if frequencies is None:
                y = first(x, grid, backward)
            else:
                wide = at_least_float32(x.dtype)
                table = directed(frequencies, channels, backward) if reverse else frequencies
                maps = table.astype(wide)[kernel_index(grid, kernel_range)]
                y = first(fourier_features(x.astype(wide), maps))
            for layer in rest:
                y = layer(nn.silu(y))
            return y

        return project

    def _table_sizes(self) -> tuple[int, int, int]:
        return self.config.max_inputs, self.config.max_hidden_layers, self.config.max_outputs

    def _fits_tables(self, topology: Topology) -> Bool[Array, "N 1"] | None:
        """Raises where a network is larger than the tables; for an edge list, whose sizes are not known, says where."""
        sizes = self._table_sizes()
        if isinstance(topology, BlockTopology):
            for role, size, name in zip(ROLES, sizes, ("max_inputs", "max_hidden_layers", "max_outputs"), strict=True):
                used = topology.spec.num_positions(role)
                if used > size:
                    raise ValueError(
                        f"the network uses {used} {role} positions, more than {name}={size} of the encoder"
                    )
            return None
        fields = topology.graph.nodes
        return (fields.position < jnp.asarray(sizes)[fields.role])[:, None]

    def _positions(self, topology: Topology) -> Float[Array, "N d"]:
        sizes = self._table_sizes()
        table = self.param("positions", nn.initializers.normal(1.0), (sum(sizes), self.node_features), jnp.float32)
        table = table.astype(self.dtype)
        starts = (0, sizes[0], sizes[0] + sizes[1])
        if isinstance(topology, BlockTopology):
            return _block_positions(topology.spec, table, starts)
        nodes = topology.graph.nodes
        return table[jnp.asarray(starts)[nodes.role] + nodes.position]

    def _probe_values(self, topology: Topology, nodes: Array, edges: Edges) -> Float[Array, "... N P"]:
        config = self.config
        num_inputs = config.max_inputs
        if isinstance(topology, BlockTopology):
            num_inputs = topology.spec.num_positions("input")
        inputs = self.param(
            "probe_inputs",
            lambda key, shape: jax.random.uniform(key, shape, minval=-1.0),
            (config.max_inputs, config.num_probes),
        )
        return probe_values(topology, nodes, edges, inputs[:num_inputs], config.max_hidden_layers)


def _block_positions(spec: NeuralGraphSpec, table: Float[Array, "R d"], starts: Sequence[int]) -> Float[Array, "N d"]:
    rows = []
    for group in spec.node_groups:
        start = starts[ROLES.index(group.role)] + spec.position_bases[group.name]
        block = table[start : start + group.slots]
        if group.slots not in (1, group.size):
            block = block[orbits(spec.action, group.axis)]
        rows.append(jnp.broadcast_to(block, (group.size, table.shape[-1])))
    return jnp.concatenate(rows)


def standardize(topology: Topology, nodes: Array, edges: Edges, statistics: WeightStatistics) -> tuple[Array, Edges]:
    """Subtracts means and divides by standard deviations; inputs, which have no bias, stay zero."""
    return _shift_and_scale(topology, nodes, edges, statistics, lambda values, mean, std: (values - mean) / std)


def destandardize(topology: Topology, nodes: Array, edges: Edges, statistics: WeightStatistics) -> tuple[Array, Edges]:
    """The inverse of `standardize`."""
    return _shift_and_scale(topology, nodes, edges, statistics, lambda values, mean, std: values * std + mean)


def _shift_and_scale(
    topology: Topology, nodes: Array, edges: Edges, statistics: WeightStatistics, combine: Any
) -> tuple[Array, Edges]:
    topology.check_levels(len(statistics.weight_mean), "the statistics are")
    weight = [per_layer(column, edges[0].dtype) for column in (statistics.weight_mean, statistics.weight_std)]
    bias = [per_layer(column, nodes.dtype) for column in (statistics.bias_mean, statistics.bias_std)]
    level = topology.by_node("level")
    shifted = combine(nodes, *(column(level)[..., 0] for column in bias))
    nodes = jnp.where(level[:, None] > 0, shifted, 0)
    edges = tuple(
        combine(values, *(column(of) for column in weight))
        for values, of in zip(edges, topology.edge_levels(), strict=True)
    )
    return nodes, topology.mask_edges(edges)


def per_layer(values: Sequence[float] | Array, dtype: Any) -> Callable[[Array], Array]:
    """A look-up of per-layer numbers by the level of a target, broadcastable to `[..., K, F]` of the edges there.

    It gives NaN where there are fewer numbers than layers.
    """
    table = jnp.asarray(values, dtype)

    def look_up(level: Int[Array, "..."]) -> Float[Array, "... 1 1"]:
        # Level 0, the inputs, is masked by the caller.
        found = jnp.take(table, jnp.maximum(level - 1, 0), mode="fill", fill_value=jnp.nan)
        return found[..., None, None]

    return look_up
