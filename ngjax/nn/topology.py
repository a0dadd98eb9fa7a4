"""How values travel between nodes and edges: over an edge list, or block by block where the spec is known.

The models are written once, against the methods the two classes share. Node values are one array `[..., N, d]`. Edge
values are a tuple of arrays, one for each bundle of edges: the edge list is a single bundle `[E, d]`; with a spec every
edge group is a bundle `[..., blocks, source, target, d]`, products between nodes and edges are broadcasts, sums over
incoming edges are sums over an axis, and nothing is gathered or scattered. Reverse edges double the bundles (or the
list): each weight is then also an edge from its target to its source, with values of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Float

from ngjax.graph import GlobalData, GroupedGraph, flatten_groups, group_graph, join_nodes, node_fields, split_nodes
from ngjax.spec import ROLES, NeuralGraphSpec, NodeLayout, pad_kernel_shape

Edges = tuple[Array, ...]
Scope = Literal["graph", "batch"]


class _End(NamedTuple):
    """The nodes at one end of an edge group: their place among all nodes, and which make up a block."""

    place: slice
    layout: NodeLayout | None


class _Bundle(NamedTuple):
    """One edge group in one direction. Its values are `[blocks, m, n, d]`, sources in axis -3, or -2 if reversed."""

    source: _End
    target: _End
    blocks: int
    reverse: bool


@dataclasses.dataclass(frozen=True)
class BlockTopology:
    """Topology of one architecture; arrays have any leading batch axes."""

    spec: NeuralGraphSpec
    reverse: bool

    @functools.cached_property
    def bundles(self) -> tuple[_Bundle, ...]:
        places = self.spec.node_slices
        forward = [
            _Bundle(
                _End(places[group.source], group.source_layout),
                _End(places[group.target], group.target_layout),
                group.blocks,
                reverse=False,
            )
            for group in self.spec.edge_groups
        ]
        backward = [_Bundle(b.target, b.source, b.blocks, reverse=True) for b in forward] if self.reverse else []
        return (*forward, *backward)

    @property
    def num_forward(self) -> int:
        return len(self.spec.edge_groups)

    def kernel_grids(self) -> list[tuple[int, int, int]]:
        """Kernel grid of each forward bundle."""
        return [pad_kernel_shape(group.kernel_shape) for group in self.spec.edge_groups]

    def join(self, forward: Edges, backward: Edges) -> Edges:
        return (*forward, *backward)

    def forward(self, edges: Edges) -> Edges:
        return edges[: self.num_forward]

    # -- between nodes and edges

    def source(self, nodes: Float[Array, "... N d"]) -> Edges:
        """The value of each edge's source, broadcastable to the edge."""
        return tuple(_spread(nodes, b.source, b.blocks, first=not b.reverse) for b in self.bundles)

    def target(self, nodes: Float[Array, "... N d"]) -> Edges:
        """The value of each edge's target, broadcastable to the edge."""
        return tuple(_spread(nodes, b.target, b.blocks, first=b.reverse) for b in self.bundles)

    def sum(self, edges: Edges, *, outgoing: bool = False) -> Float[Array, "... N d"]:
        """Sum over the incoming edges of each node, or over the outgoing ones."""
        return self._reduce(edges, jnp.sum, jnp.add, outgoing)

    def min(self, edges: Edges) -> Float[Array, "... N d"]:
        """Least over the incoming edges of each node, 0 where there are none."""
        return self._reduce(edges, functools.partial(extreme, jnp.min), jnp.minimum)

    def max(self, edges: Edges) -> Float[Array, "... N d"]:
        """Greatest over the incoming edges of each node, 0 where there are none."""
        return self._reduce(edges, functools.partial(extreme, jnp.max), jnp.maximum)

    def _reduce(self, edges: Edges, over_axis: Callable, pairwise: Callable, outgoing: bool = False) -> Array:
        found: dict[int, Array] = {}
        for bundle, values in zip(self.bundles, edges, strict=True):
            end = bundle.source if outgoing else bundle.target
            reduced = join_nodes(over_axis(values, -3 if bundle.reverse == outgoing else -2), end.layout)
            start = end.place.start
            found[start] = pairwise(found[start], reduced) if start in found else reduced
        lead, width = edges[0].shape[:-4], edges[0].shape[-1]
        parts = [
            found.get(place.start, jnp.zeros((*lead, place.stop - place.start, width), edges[0].dtype))
            for place in self.spec.node_slices.values()
        ]
        return jnp.concatenate(parts, axis=-2)

    def degree(self, *, outgoing: bool = False) -> Float[Array, "N 1"]:
        """Number of incoming edges of each node, or of outgoing ones."""
        degrees = np.zeros((self.spec.num_nodes, 1), np.float32)
        for bundle in self.bundles:
            own, other = (bundle.source, bundle.target) if outgoing else (bundle.target, bundle.source)
            degrees[own.place] += (other.place.stop - other.place.start) // bundle.blocks
        return jnp.asarray(degrees)

    # -- nodes of one graph

    def node_mean(self, nodes: Float[Array, "... N d"], scope: Scope = "graph") -> Array:
        """Mean over the nodes and channels of each graph (or of all graphs together), broadcastable to the nodes."""
        return jnp.mean(nodes, axis=(-2, -1) if scope == "graph" else None, keepdims=True)

    def mask_nodes(self, nodes: Array) -> Array:
        return nodes

    def mask_edges(self, edges: Edges) -> Edges:
        return edges

    def by_node(self, name: str) -> Array:
        """A field of the node groups, `[N]`: `role`, `activation` or `level`."""
        return node_fields(self.spec)[name]

    def relative_depth(self) -> Float[Array, "N 1"]:
        """0 at the inputs, 1 at the outputs."""
        return (self.by_node("level") / self.spec.max_level)[:, None]

    def edge_levels(self) -> Edges:
        """Level of the target of each forward bundle, one number."""
        return tuple(jnp.asarray(self.spec.node_group[group.target].level) for group in self.spec.edge_groups)

    def check_levels(self, count: int, what: str) -> None:
        """Raises a ValueError where the network is deeper than `count` levels."""
        if self.spec.max_level > count:
            raise ValueError(f"{what} for {count} layers, but the network has {self.spec.max_level}")

    # -- pooling

    def pool_nodes(self, nodes: Float[Array, "... N d"], how: Callable) -> Float[Array, "... d"]:
        """`jnp.mean` or `jnp.max` over the nodes of each graph."""
        return extreme(jnp.max, nodes, -2) if how is jnp.max else how(nodes, axis=-2)

    def output_nodes(self, nodes: Float[Array, "... N d"], count: int | None) -> Float[Array, "... O d"]:
        """The output nodes of each graph, in order."""
        outputs = self.spec.num_positions("output")
        if count is not None and count != outputs:
            raise ValueError(f"the readout is for {count} output neurons, the network has {outputs}")
        return nodes[..., self.spec.num_nodes - outputs :, :]

    # -- all pairs of nodes

    @property
    def max_nodes(self) -> int:
        return self.spec.num_nodes

    def dense_nodes(self, nodes: Float[Array, "... N d"]) -> Float[Array, "... N d"]:
        return nodes

    def from_dense_nodes(self, dense: Float[Array, "... N d"]) -> Float[Array, "... N d"]:
        return dense

    def dense_mask(self) -> None:
        """Every node is real."""
        return

    def pairs(self, edges: Edges, background: Float[Array, " d"]) -> Float[Array, "... N N d"]:
        """Edge values at `[source, target]`, summed where edges are parallel; `background` where there is no edge."""
        groups = list(self.spec.node_slices.values())
        found: dict[tuple[int, int], list[tuple[Array, np.ndarray | None]]] = {}
        for bundle, values in zip(self.bundles, edges, strict=True):
            ends = (bundle.source.place.start, bundle.target.place.start)
            found.setdefault(ends, []).append(_expand(values, bundle))
        lead, width = edges[0].shape[:-4], edges[0].shape[-1]
        rows = []
        for source in groups:
            row = []
            for target in groups:
                shape = (*lead, source.stop - source.start, target.stop - target.start, width)
                row.append(_merge(found.get((source.start, target.start), []), background, shape))
            rows.append(jnp.concatenate(row, axis=-2))
        return jnp.concatenate(rows, axis=-3)

    def from_pairs(self, pairs: Float[Array, "... N N d"]) -> Edges:
        """Values of the forward edges."""
        edges = []
        for bundle in self.bundles[: self.num_forward]:
            block = pairs[..., bundle.source.place, bundle.target.place, :]
            block = split_nodes(
                jnp.swapaxes(block, -3, -2), bundle.blocks, bundle.source.layout
            )  # [.., targets, B, m, d]
            block = split_nodes(jnp.moveaxis(block, -4, -2), bundle.blocks, bundle.target.layout)  # [.., B, m, B, n, d]
            own = jnp.diagonal(block, axis1=-5, axis2=-3)  # [.., m, n, d, B]
            edges.append(jnp.moveaxis(own, -1, -4))
        return tuple(edges)

    # -- the graph around the values

    def write(self, graph: Any, nodes: Array, edges: Edges, updates: dict[str, Array]) -> Any:
        """`graph` with new node features, forward edge features `[..., K, d]` and global fields."""
        grouped = group_graph(self.spec, graph) if isinstance(graph, jraph.GraphsTuple) else graph
        result = GroupedGraph(nodes, edges, grouped.globals._replace(**updates))
        return flatten_groups(self.spec, result) if isinstance(graph, jraph.GraphsTuple) else result


# XLA may compute the messages twice, once for their extreme and once to see which of them equal it, and round
# differently (it does on CPU without optimization). JAX's own derivatives then divide zero by a count of zero.


def _is_almost(values: Array, best: Array) -> Array:
    """1 where values equal the extreme but for rounding, else 0."""
    tolerance = 16 * jnp.finfo(values.dtype).eps * jnp.abs(best)
    return (jnp.abs(values - best) <= tolerance).astype(values.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def extreme(over_axis: Callable, values: Array, axis: int | tuple[int, ...]) -> Array:
    """`jnp.min` or `jnp.max`, whose derivative is shared by what equals the extreme and is never NaN."""
    return over_axis(values, axis=axis)


@extreme.defjvp
def _extreme_jvp(over_axis: Callable, axis: int | tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    values = jax.lax.optimization_barrier(primals[0])
    best = extreme(over_axis, values, axis)
    chosen = _is_almost(values, jnp.expand_dims(best, axis))
    count = jnp.maximum(jnp.sum(chosen, axis=axis), 1)
    return best, jnp.sum(chosen * tangents[0], axis=axis) / count


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def _segment_extreme(over_segment: Callable, values: Array, segments: Array, count: int) -> Array:
    """`jax.ops.segment_min` or `segment_max`, with the derivative of `extreme`."""
    return over_segment(values, segments, count)


@_segment_extreme.defjvp
def _segment_extreme_jvp(over_segment: Callable, count: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    values, segments = primals
    values = jax.lax.optimization_barrier(values)
    best = _segment_extreme(over_segment, values, segments, count)
    chosen = _is_almost(values, best[segments])
    ties = jnp.maximum(jax.ops.segment_sum(chosen, segments, count), 1)
    return best, jax.ops.segment_sum(chosen * tangents[0], segments, count) / ties


def _spread(nodes: Array, end: _End, blocks: int, first: bool) -> Array:
    values = split_nodes(nodes[..., end.place, :], blocks, end.layout)
    return values[..., :, None, :] if first else values[..., None, :, :]


def _expand(values: Array, bundle: _Bundle) -> tuple[Array, np.ndarray | None]:
    """A bundle as `[..., source nodes, target nodes, d]`, and where it has edges (`None` for everywhere)."""
    if bundle.reverse:
        values = jnp.swapaxes(values, -3, -2)
    blocks, m, n, _ = values.shape[-4:]
    own_block = np.eye(blocks, dtype=bool)[:, None, :, None]
    full = jnp.where(own_block[..., None], values[..., :, :, None, :, :], 0)  # [.., B, m, B, n, d]
    where = np.broadcast_to(own_block, (blocks, m, blocks, n))[..., None]

    def to_nodes(array: Array) -> Array:
        array = join_nodes(array, bundle.target.layout)  # [.., B, m, targets, d]
        return jnp.swapaxes(join_nodes(jnp.moveaxis(array, -2, -4), bundle.source.layout), -3, -2)

    if blocks == 1:
        return to_nodes(full), None
    with jax.ensure_compile_time_eval():
        return to_nodes(full), np.asarray(to_nodes(jnp.asarray(where)))[..., 0]


def _merge(parts: list[tuple[Array, np.ndarray | None]], background: Array, shape: tuple[int, ...]) -> Array:
    if not parts:
        return jnp.broadcast_to(background, shape)
    total = functools.reduce(jnp.add, (values for values, _ in parts))
    if any(where is None for _, where in parts):
        return total
    where = functools.reduce(np.logical_or, (where for _, where in parts if where is not None))
    return jnp.where(where[..., None], total, background)


@dataclasses.dataclass(frozen=True)
class ListTopology:
    """Topology of an edge list: one graph, or a padded batch of graphs of any architectures."""

    graph: jraph.GraphsTuple
    reverse: bool

    @functools.cached_property
    def senders(self) -> Array:
        graph = self.graph
        return jnp.concatenate([graph.senders, graph.receivers]) if self.reverse else graph.senders

    @functools.cached_property
    def receivers(self) -> Array:
        graph = self.graph
        return jnp.concatenate([graph.receivers, graph.senders]) if self.reverse else graph.receivers

    @functools.cached_property
    def real_edges(self) -> Array:
        """`[E, 1]`, reverse edges included; padding is False."""
        real = jnp.any(self.graph.edges.mask, axis=-1)[:, None]
        return jnp.concatenate([real, real]) if self.reverse else real

    @property
    def num_nodes(self) -> int:
        return self.graph.nodes.mask.shape[0]

    @property
    def num_graphs(self) -> int:
        return self.graph.n_node.shape[0]

    @property
    def num_forward_edges(self) -> int:
        return self.graph.senders.shape[0]

    def kernel_grids(self) -> list[tuple[int, int, int]]:
        z, y, x = self.graph.edges.offsets.shape[:3]
        return [(z, y, x)]

    def join(self, forward: Edges, backward: Edges) -> Edges:
        return (jnp.concatenate([forward[0], backward[0]]),)

    def forward(self, edges: Edges) -> Edges:
        return (edges[0][: self.num_forward_edges],)

    # -- between nodes and edges

    def source(self, nodes: Float[Array, "N d"]) -> Edges:
        return (nodes[self.senders],)

    def target(self, nodes: Float[Array, "N d"]) -> Edges:
        return (nodes[self.receivers],)

    def sum(self, edges: Edges, *, outgoing: bool = False) -> Float[Array, "N d"]:
        values = jnp.where(self.real_edges, edges[0], 0)
        return jax.ops.segment_sum(values, self._end(outgoing), self.num_nodes)

    def min(self, edges: Edges) -> Float[Array, "N d"]:
        values = jnp.where(self.real_edges, edges[0], jnp.inf)
        return self._where_any(_segment_extreme(jax.ops.segment_min, values, self.receivers, self.num_nodes))

    def max(self, edges: Edges) -> Float[Array, "N d"]:
        values = jnp.where(self.real_edges, edges[0], -jnp.inf)
        return self._where_any(_segment_extreme(jax.ops.segment_max, values, self.receivers, self.num_nodes))

    def _where_any(self, nodes: Array) -> Array:
        return jnp.where(self.degree() > 0, nodes, 0)

    def degree(self, *, outgoing: bool = False) -> Float[Array, "N 1"]:
        return jax.ops.segment_sum(self.real_edges.astype(jnp.float32), self._end(outgoing), self.num_nodes)

    def _end(self, outgoing: bool) -> Array:
        """The node at which each edge is counted."""
        return self.senders if outgoing else self.receivers

    # -- nodes of one graph

    def node_mean(self, nodes: Float[Array, "N d"], scope: Scope = "graph") -> Array:
        values = jnp.mean(self.mask_nodes(nodes), axis=-1)
        real = self.graph.nodes.mask.astype(values.dtype)
        if scope == "batch":
            return (jnp.sum(values) / jnp.sum(real))[None, None]
        of_graph, count = (jax.ops.segment_sum(x, self.graph.nodes.graph, self.num_graphs + 1) for x in (values, real))
        return (of_graph / jnp.maximum(count, 1))[self.graph.nodes.graph][:, None]

    def mask_nodes(self, nodes: Array) -> Array:
        """Zero for padding, whatever it holds."""
        return jnp.where(self.graph.nodes.mask[:, None], nodes, 0)

    def mask_edges(self, edges: Edges) -> Edges:
        """Zero for padding and for kernel positions an edge does not have; edges are forward, `[E, K or 1, F]`."""
        mask = self.graph.edges.mask
        if edges[0].shape[-2] != mask.shape[-1]:  # one vector per edge
            mask = jnp.any(mask, axis=-1, keepdims=True)
        return (jnp.where(mask[..., None], edges[0], 0),)

    def by_node(self, name: str) -> Array:
        return getattr(self.graph.nodes, name)

    def relative_depth(self) -> Float[Array, "N 1"]:
        nodes = self.graph.nodes
        deepest = jax.ops.segment_max(nodes.level, nodes.graph, self.num_graphs + 1)
        return (nodes.level / jnp.maximum(deepest, 1)[nodes.graph])[:, None]

    def edge_levels(self) -> Edges:
        """Level of the target of each forward edge, `[E]`."""
        return (self.graph.nodes.level[self.graph.receivers],)

    def check_levels(self, count: int, what: str) -> None:
        """Depth is not known before the program runs: look-ups beyond a table give NaN."""

    # -- pooling

    def pool_nodes(self, nodes: Float[Array, "N d"], how: Callable) -> Float[Array, "G d"]:
        graph = self.graph.nodes.graph
        if how is jnp.max:
            values = _segment_extreme(jax.ops.segment_max, nodes, graph, self.num_graphs + 1)[:-1]
            return jnp.where(self.graph.globals.mask[:, None], values, 0)
        total, count = (
            jax.ops.segment_sum(x, graph, self.num_graphs + 1)[:-1]
            for x in (self.mask_nodes(nodes), self.graph.nodes.mask.astype(nodes.dtype)[:, None])
        )
        return total / jnp.maximum(count, 1)

    def output_nodes(self, nodes: Float[Array, "N d"], count: int | None) -> Float[Array, "G O d"]:
        """The output nodes of each graph, the last ones; NaN for a graph with another number of them."""
        if count is None:
            raise ValueError("without spec= the number of output neurons must be given: num_outputs")
        is_output = (self.graph.nodes.role == ROLES.index("output")) & self.graph.nodes.mask
        outputs, sizes = (
            jax.ops.segment_sum(x.astype(jnp.int32), self.graph.nodes.graph, self.num_graphs + 1)[:-1]
            for x in (is_output, self.graph.nodes.mask)
        )
        first = self.graph.globals.node_index[:, 0] + sizes - count
        index = jnp.clip(first[:, None] + jnp.arange(count), 0, self.num_nodes - 1)
        values = jnp.where((outputs == count)[:, None, None], nodes[index], jnp.nan)
        return jnp.where(self.graph.globals.mask[:, None, None], values, 0)

    # -- all pairs of nodes

    @property
    def max_nodes(self) -> int:
        return self.graph.globals.node_index.shape[1]

    def dense_nodes(self, nodes: Float[Array, "N d"]) -> Float[Array, "G M d"]:
        dense = nodes[self.graph.globals.node_index]
        return jnp.where(self.dense_mask()[..., None], dense, 0)

    def from_dense_nodes(self, dense: Float[Array, "G M d"]) -> Float[Array, "N d"]:
        index = self.graph.globals.node_index
        place = jnp.where(self.dense_mask(), index, self.num_nodes)  # out of range: dropped
        empty = jnp.zeros((self.num_nodes, dense.shape[-1]), dense.dtype)
        return empty.at[place].set(dense, mode="drop")

    def dense_mask(self) -> Array:
        """`[G, M]`: which places hold a node of the graph."""
        index = self.graph.globals.node_index
        own = self.graph.nodes.graph[index] == jnp.arange(self.num_graphs)[:, None]
        own &= index == index[:, :1] + jnp.arange(self.max_nodes)  # past the end, the last node stands again and again
        return own & self.graph.nodes.mask[index] & self.graph.globals.mask[:, None]

    def _pair_index(self) -> tuple[Array, Array, Array]:
        graph = self.graph.nodes.graph[self.senders]
        graph = jnp.where(self.real_edges[:, 0], graph, self.num_graphs)  # out of range: dropped
        first = self.graph.globals.node_index[jnp.minimum(graph, self.num_graphs - 1), 0]
        return graph, self.senders - first, self.receivers - first

    def pairs(self, edges: Edges, background: Float[Array, " d"]) -> Float[Array, "G M M d"]:
        size = (self.num_graphs, self.max_nodes, self.max_nodes)
        index = self._pair_index()
        values = jnp.zeros((*size, edges[0].shape[-1]), edges[0].dtype).at[index].add(edges[0], mode="drop")
        has_edge = jnp.zeros(size, bool).at[index].set(True, mode="drop")
        return jnp.where(has_edge[..., None], values, background)

    def from_pairs(self, pairs: Float[Array, "G M M d"]) -> Edges:
        graph, source, target = (index[: self.num_forward_edges] for index in self._pair_index())
        return (pairs[jnp.minimum(graph, self.num_graphs - 1), source, target],)

    # -- the graph around the values

    def write(
        self, graph: jraph.GraphsTuple, nodes: Array, edges: Edges, updates: dict[str, Array]
    ) -> jraph.GraphsTuple:
        real = self.real_edges[: self.num_forward_edges, :, None]
        return graph._replace(
            nodes=graph.nodes._replace(features=self.mask_nodes(nodes)),
            edges=graph.edges._replace(features=jnp.where(real, edges[0], 0)),
            globals=graph.globals._replace(**updates),
        )


Topology = BlockTopology | ListTopology


def read_graph(
    graph: jraph.GraphsTuple | GroupedGraph, spec: NeuralGraphSpec | None, *, reverse: bool
) -> tuple[Topology, Array, Edges, GlobalData]:
    """The topology of a graph, its node features, forward edge features `[..., K, F]` and globals, padding set to zero.

    Raises:
      TypeError: neither a `GraphsTuple` nor a `GroupedGraph` with its spec.
      ValueError: an edge list with batch axes and no spec, or a graph of another architecture than `spec`.
    """
    if spec is not None:
        grouped = group_graph(spec, graph) if isinstance(graph, jraph.GraphsTuple) else graph
        return BlockTopology(spec, reverse), grouped.nodes, grouped.edges, grouped.globals
    if not isinstance(graph, jraph.GraphsTuple):
        raise TypeError(f"expected a jraph.GraphsTuple, or a GroupedGraph with spec=; received {type(graph).__name__}")
    if graph.nodes.features.ndim != 2:
        raise ValueError(
            f"an edge list without spec= has no batch axes, received node features {graph.nodes.features.shape}: pass "
            "spec= for networks of one architecture, or batch_graphs(...) for several"
        )
    topology = ListTopology(graph, reverse)
    nodes = topology.mask_nodes(graph.nodes.features)
    return topology, nodes, topology.mask_edges((graph.edges.features,)), graph.globals
