"""Graphs of different architectures in one padded `jraph.GraphsTuple` of static size.

A program that reads such a batch compiles once for each `GraphBudget`, not once for each mixture of architectures.
Padding is marked by masks (`nodes.mask`, `edges.mask`, `globals.mask`); models set it to zero on entry, so whatever it
holds never reaches a real graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
from jaxtyping import Array

from ngjax.graph import EdgeData, GlobalData, NodeData, kernel_offsets, kernel_padding
from ngjax.spec import NeuralGraphSpec


class GraphBudget(NamedTuple):
    """Static sizes of a padded batch.

    Attributes:
      graphs: most graphs it holds.
      nodes: most nodes, all graphs together.
      edges: most edges, all graphs together.
      nodes_per_graph: most nodes of one graph; what NG-T, which looks at all pairs of nodes, is square in.
    """

    graphs: int
    nodes: int
    edges: int
    nodes_per_graph: int


def budget_for(specs: Sequence[NeuralGraphSpec], graphs: int, *, multiple: int = 64) -> GraphBudget:
    """The budget that holds any `graphs` networks of the given architectures, rounded up to a multiple.

    Rounding lets zoos of similar networks share a budget and thus a compiled program.

    Raises:
      ValueError: no specs.
    """
    if not specs:
        raise ValueError("expected at least one spec, received none")

    def round_up(n: int) -> int:
        return -(-n // multiple) * multiple

    nodes = max(spec.num_nodes for spec in specs)
    edges = max(spec.num_edges for spec in specs)
    return GraphBudget(graphs, round_up(graphs * nodes), round_up(graphs * edges), nodes)


def batch_graphs(graphs: Sequence[jraph.GraphsTuple], budget: GraphBudget) -> jraph.GraphsTuple:
    """One padded `GraphsTuple` of the budget's size, real graphs first.

    Kernels are centred in the largest kernel grid of the batch, and loose scalars padded to the largest number. Where
    the batch has room for another graph, all padding nodes and edges belong to the first padding graph, which is
    jraph's convention. Works under `jit`.

    Args:
      graphs: from `to_graph`, one network each, without leading batch axes.
      budget: sizes of the result.

    Raises:
      ValueError: no graphs, a graph with batch axes, different numbers of features, or more than the budget holds.
    """
    if not graphs:
        raise ValueError("expected at least one graph, received none")
    for i, graph in enumerate(graphs):
        _check_single(graph, i)
    sizes = [(graph.nodes.mask.shape[0], graph.edges.mask.shape[0]) for graph in graphs]
    _check_budget(sizes, budget)
    _check_same("features per scalar", [graph.nodes.features.shape[-1] for graph in graphs])

    num_graphs = len(graphs)
    num_nodes, num_edges = (sum(column) for column in zip(*sizes, strict=True))
    offsets = [sum(n for n, _ in sizes[:i]) for i in range(num_graphs)]
    spare_nodes, spare_edges = budget.nodes - num_nodes, budget.edges - num_edges
    spare_graphs = budget.graphs - num_graphs
    most_loose = max(graph.globals.loose.shape[-2] for graph in graphs)
    grid = tuple(max(graph.edges.offsets.shape[axis] for graph in graphs) for axis in range(3))
    with jax.numpy_dtype_promotion("standard"):  # one dtype that holds all, also for users who forbid promotion
        dtype = jnp.result_type(*(graph.nodes.features.dtype for graph in graphs))

    def node_column(name: str, fill: int) -> Array:
        parts = [getattr(graph.nodes, name) for graph in graphs]
        return jnp.concatenate([*parts, jnp.full(spare_nodes, fill, parts[0].dtype)])

    def pad_rows(parts: list[Array], spare: int) -> Array:
        parts = [part.astype(dtype) if part.dtype != bool else part for part in parts]
        return jnp.concatenate([*parts, jnp.zeros((spare, *parts[0].shape[1:]), parts[0].dtype)])

    # A padding edge joins the last node to itself: padding where there is any, and masked either way.
    idle = jnp.full(spare_edges, budget.nodes - 1, jnp.int32)
    node_counts = [n for n, _ in sizes] + ([spare_nodes] if spare_graphs else [])
    edge_counts = [e for _, e in sizes] + ([spare_edges] if spare_graphs else [])
    graph_of_node = [jnp.full(n, i, jnp.int32) for i, (n, _) in enumerate(sizes)]
    real = jnp.arange(budget.graphs) < num_graphs
    first = jnp.array(offsets + [0] * spare_graphs, jnp.int32)
    index = first[:, None] + jnp.arange(budget.nodes_per_graph, dtype=jnp.int32)
    nodes = NodeData(
        features=pad_rows([graph.nodes.features for graph in graphs], spare_nodes),
        mask=jnp.arange(budget.nodes) < num_nodes,
        graph=jnp.concatenate([*graph_of_node, jnp.full(spare_nodes, budget.graphs, jnp.int32)]),
        **{name: node_column(name, 0) for name in ("role", "group", "position", "activation", "level")},
    )
    edges = EdgeData(
        features=pad_rows([_to_grid(graph.edges.features, graph, grid) for graph in graphs], spare_edges),
        mask=pad_rows([_to_grid(graph.edges.mask[..., None], graph, grid)[..., 0] for graph in graphs], spare_edges),
        offsets=kernel_offsets(grid),
    )
    return jraph.GraphsTuple(
        nodes=nodes,
        edges=edges,
        senders=jnp.concatenate([*(g.senders + o for g, o in zip(graphs, offsets, strict=True)), idle]),
        receivers=jnp.concatenate([*(g.receivers + o for g, o in zip(graphs, offsets, strict=True)), idle]),
        globals=GlobalData(
            loose=pad_rows([_padded_loose(graph, most_loose) for graph in graphs], spare_graphs),
            mask=real,
            node_index=jnp.minimum(index, budget.nodes - 1),
        ),
        n_node=jnp.array(node_counts + [0] * (budget.graphs - len(node_counts)), jnp.int32),
        n_edge=jnp.array(edge_counts + [0] * (budget.graphs - len(edge_counts)), jnp.int32),
    )


def unbatch_graphs(batch: jraph.GraphsTuple, graphs: Sequence[jraph.GraphsTuple]) -> list[jraph.GraphsTuple]:
    """The real graphs of a batch, one by one, with the batch's features in the wiring of `graphs`.

    With it `to_params` turns the output of a model over a mixed batch into one pytree for each network.

    Args:
      batch: `batch_graphs(graphs, budget)` after a model of per-parameter outputs.
      graphs: the graphs that were batched, in the same order.
    """
    singles = []
    node_start = edge_start = 0
    grid = tuple(batch.edges.offsets.shape[:3])
    for i, graph in enumerate(graphs):
        num_nodes, num_edges = graph.nodes.mask.shape[0], graph.edges.mask.shape[0]
        nodes = batch.nodes.features[node_start : node_start + num_nodes]
        edges = _from_grid(batch.edges.features[edge_start : edge_start + num_edges], graph, grid)
        globals_ = graph.globals._replace(loose=batch.globals.loose[i : i + 1, : graph.globals.loose.shape[-2]])
        singles.append(
            graph._replace(
                nodes=graph.nodes._replace(features=nodes),
                edges=graph.edges._replace(features=edges),
                globals=globals_,
            )
        )
        node_start, edge_start = node_start + num_nodes, edge_start + num_edges
    return singles


def _check_single(graph: jraph.GraphsTuple, i: int) -> None:
    if graph.n_node.shape != (1,) or graph.nodes.features.ndim != 2 or graph.edges.features.ndim != 3:
        raise ValueError(
            f"graph {i}: expected one network without batch axes, received node features "
            f"{graph.nodes.features.shape} and n_node {graph.n_node.shape}; stack networks of one architecture with "
            "to_groups, and batch networks of several from their single graphs"
        )


def _check_budget(sizes: list[tuple[int, int]], budget: GraphBudget) -> None:
    for i, (nodes, _) in enumerate(sizes):
        if nodes > budget.nodes_per_graph:
            raise ValueError(
                f"graph {i} has {nodes} nodes, more than the budget's nodes_per_graph={budget.nodes_per_graph}"
            )
    received = (len(sizes), sum(n for n, _ in sizes), sum(e for _, e in sizes))
    for name, count, limit in zip(("graphs", "nodes", "edges"), received, budget[:3], strict=True):
        if count > limit:
            raise ValueError(f"the graphs have {count} {name} together, more than the budget's {name}={limit}")


def _check_same(what: str, received: list[int]) -> None:
    if len(set(received)) > 1:
        raise ValueError(f"graphs of one batch need the same number of {what}; received {received}")


def _padded_loose(graph: jraph.GraphsTuple, most: int) -> Array:
    """`[1, S, F]` with zeros behind, `[1, most, F]`."""
    loose = graph.globals.loose
    return jnp.pad(loose, [(0, 0), (0, most - loose.shape[-2]), (0, 0)])


def _to_grid(array: Array, graph: jraph.GraphsTuple, grid: tuple[int, ...]) -> Array:
    """`[E, K, F]` in the graph's own kernel grid to the batch's."""
    own = graph.edges.offsets.shape[:3]
    block = array.reshape(array.shape[0], *own, array.shape[-1])
    block = jnp.pad(block, [(0, 0), *kernel_padding(own, grid), (0, 0)])
    return block.reshape(array.shape[0], math.prod(grid), array.shape[-1])


def _from_grid(array: Array, graph: jraph.GraphsTuple, grid: tuple[int, ...]) -> Array:
    own = graph.edges.offsets.shape[:3]
    window = tuple(slice(b, b + k) for (b, _), k in zip(kernel_padding(own, grid), own, strict=True))
    block = array.reshape(array.shape[0], *grid, array.shape[-1])[(slice(None), *window)]
    return block.reshape(array.shape[0], math.prod(own), array.shape[-1])
