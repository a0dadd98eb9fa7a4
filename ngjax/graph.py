"""Weights as a graph and back: `(spec, params) <-> GroupedGraph <-> jraph.GraphsTuple`.

The arrays of each edge group in their own shape (`GroupedGraph`) are the truth, and what functions that know the spec
work on. The edge list (`jraph.GraphsTuple`) with one common kernel grid is a view of them, made where networks of
different architecture share a batch. All of it is pure and works under `jit`, `vmap` and `grad`; index arrays are made
in the program.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ngjax.spec import (
    ACTIVATIONS,
    ROLES,
    EdgeGroup,
    NeuralGraphSpec,
    ParamView,
    format_path,
    pad_kernel_shape,
)


class NodeData(NamedTuple):
    """Nodes of a graph, or of several one after the other. Leading batch axes stand on `features` alone.

    Attributes:
      features: biases, `[..., N, F]`; zero where a neuron has none.
      mask: False for padding.
      graph: which graph of the batch a node belongs to; the number of graphs for padding.
      role: index into `ngjax.spec.ROLES` (input, hidden, output).
      group: number of the node group in its spec.
      position: number of the position slot among those of the role.
      activation: index into `ngjax.spec.ACTIVATIONS`.
      level: depth, 0 for inputs.
    """

    features: Float[Array, "... N F"]
    mask: Bool[Array, " N"]
    graph: Int[Array, " N"]
    role: Int[Array, " N"]
    group: Int[Array, " N"]
    position: Int[Array, " N"]
    activation: Int[Array, " N"]
    level: Int[Array, " N"]


class EdgeData(NamedTuple):
    """Edges of a graph, from `senders` to `receivers`.

    Attributes:
      features: weights, `[..., E, K, F]`, `K` the positions of the common kernel grid, row-major.
      mask: which kernel positions the edge has; all False for padding.
      offsets: offset of each kernel position from the kernel's centre along three spatial axes.
    """

    features: Float[Array, "... E K F"]
    mask: Bool[Array, "E K"]
    offsets: Int[Array, "Kz Ky Kx 3"]


class GlobalData(NamedTuple):
    """What belongs to a network as a whole. In an edge list, `...` ends with the graphs of the batch.

    Attributes:
      loose: scalars without a place in the graph, in the order of `spec.loose`.
      mask: False for padding graphs; only in edge lists.
      node_index: the nodes of each graph, padded to the budget's `nodes_per_graph`; only in edge lists.
      probes: values of the output neurons at the learned probe inputs, put there by a model.
      token: the class token, put there by NG-T.
      pairs: features of all ordered pairs of nodes, put there by NG-T.
    """

    loose: Float[Array, "... S F"]
    mask: Bool[Array, " G"] | None = None
    node_index: Int[Array, "G M"] | None = None
    probes: Float[Array, "... O P"] | None = None
    token: Float[Array, "... D"] | None = None
    pairs: Float[Array, "... M M C"] | None = None


class GroupedGraph(NamedTuple):
    """The neural graph of one architecture: any leading batch axes, nothing padded, no index arrays.

    Attributes:
      nodes: all nodes in the order of the spec, `[..., N, F]`.
      edges: per edge group `[..., blocks, source, target, K, F]`, `K` the group's own kernel positions.
      globals: loose scalars.
    """

    nodes: Float[Array, "... N F"]
    edges: tuple[Float[Array, "... B I O K F"], ...]
    globals: GlobalData


# -- parameters to groups and back ------------------------------------------------------------------------------------


def to_groups(spec: NeuralGraphSpec, params: Any, *, feature_axis: bool | None = None) -> GroupedGraph:
    """The weights as node and edge groups.

    Leaves may carry any leading batch axes, and one trailing feature axis of length F (value, gradient, momenta, ...).
    Which of the two an extra axis is, is read off the shapes; where both readings fit every leaf, it is the feature
    axis.

    Args:
      spec: of the architecture.
      params: the parameter pytree.
      feature_axis: whether leaves end with a feature axis; `None` reads it off the shapes.

    Raises:
      ValueError: the leaves are not those of the spec, naming the first that differs.
      TypeError: a complex leaf, or one that is no array.
    """
    leaves, dtype = _leaves_with_features(spec, params, feature_axis)
    lead = next(
        leaf.shape[: leaf.ndim - len(p.shape) - 1]
        for leaf, p in zip(leaves, spec.params, strict=True)
        if leaf is not None
    )
    num_features = next(leaf.shape[-1] for leaf in leaves if leaf is not None)

    def block(view: ParamView) -> Array:
        return _read_view(leaves[view.param], view).astype(dtype)

    nodes = [
        jnp.zeros((*lead, group.size, num_features), dtype)
        if group.bias is None
        else block(group.bias).reshape(*lead, group.size, num_features)
        for group in spec.node_groups
    ]
    edges = tuple(
        jnp.full((*lead, *spec.edge_block_shape(group), 1, num_features), group.constant, dtype)
        if group.view is None
        else block(group.view)
        for group in spec.edge_groups
    )
    loose = [block(view).reshape(*lead, -1, num_features) for view in spec.loose]
    loose.append(jnp.zeros((*lead, 0, num_features), dtype))
    return GroupedGraph(jnp.concatenate(nodes, axis=-2), edges, GlobalData(loose=jnp.concatenate(loose, axis=-2)))


def to_params(
    spec: NeuralGraphSpec,
    graph: jraph.GraphsTuple | GroupedGraph,
    *,
    like: Any = None,
    feature_axis: bool | None = None,
) -> Any:
    """The parameter pytree that a graph stands for; the exact inverse of `to_graph` and `to_groups`.

    Leaves have the graph's dtype, or the spec's where the spec's leaves differ among themselves, or that of `like`.

    Args:
      spec: of the architecture.
      graph: of this architecture, with any leading batch axes.
      like: a pytree that says which classes to build, and holds the leaves without a home (integers, keys).
      feature_axis: whether leaves get the trailing feature axis; `None` leaves it out where it has length one.

    Raises:
      ValueError: the graph is not of this architecture, or `like` is needed and missing.
    """
    grouped = group_graph(spec, graph) if isinstance(graph, jraph.GraphsTuple) else graph
    _check_groups(spec, grouped)
    lead, num_features = grouped.nodes.shape[:-2], grouped.nodes.shape[-1]
    homes: dict[int, list[tuple[ParamView, Array]]] = {}
    for group in spec.node_groups:
        if group.bias is not None:
            homes.setdefault(group.bias.param, []).append(
                (group.bias, grouped.nodes[..., spec.node_slices[group.name], :])
            )
    for edge_group, array in zip(spec.edge_groups, grouped.edges, strict=True):
        if edge_group.view is not None and not edge_group.mirror:
            homes.setdefault(edge_group.view.param, []).append((edge_group.view, array))
    start = 0
    for view in spec.loose:
        stop = start + view.shape[2]
        homes.setdefault(view.param, []).append((view, grouped.globals.loose[..., start:stop, :]))
        start = stop

    given = None if like is None else spec.flatten(like)
    dtypes = {param.dtype for param in spec.params if param.is_floating}
    keep_features = num_features != 1 if feature_axis is None else feature_axis
    if num_features != 1 and not keep_features:
        raise ValueError(f"feature_axis=False needs a graph with one feature, received {num_features}")
    leaves = []
    for i, param in enumerate(spec.params):
        if not param.is_floating:
            if given is None:
                raise ValueError(
                    f"parameter {format_path(param.path)} is {param.dtype} and has no home in the graph: pass like= with "
                    "a pytree that holds it"
                )
            leaves.append(given[i])
            continue
        leaf = _assemble(homes[i], (*lead, *param.shape, num_features), len(lead))
        if not keep_features:
            leaf = leaf[..., 0]
        if given is not None:
            leaf = leaf.astype(given[i].dtype)
        elif len(dtypes) > 1:
            leaf = leaf.astype(param.dtype)
        leaves.append(leaf)
    return spec.unflatten(leaves, like=like)


def _leaves_with_features(spec: NeuralGraphSpec, params: Any, feature_axis: bool | None) -> tuple[list[Any], jnp.dtype]:
    """Floating leaves with a trailing feature axis (`None` for the others), and their common dtype."""
    leaves = spec.flatten(params)
    floating = [(p, leaf) for p, leaf in zip(spec.params, leaves, strict=True) if p.is_floating]
    for param, leaf in floating:
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"parameter {format_path(param.path)}: expected an array, received {type(leaf).__name__}")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"parameter {format_path(param.path)}: expected a floating array, received {leaf.dtype}")
    readings = (True, False) if feature_axis is None else (feature_axis,)
    has_features = next((r for r in readings if _reading_fits(floating, r)), None)
    if has_features is None:
        _raise_shape_error(floating)
    leaves = [
        None if not p.is_floating else jnp.asarray(leaf) if has_features else jnp.asarray(leaf)[..., None]
        for p, leaf in zip(spec.params, leaves, strict=True)
    ]
    return leaves, jnp.result_type(*(leaf.dtype for _, leaf in floating))


def _reading_fits(floating: list[tuple[Any, Any]], has_features: bool) -> bool:
    """Whether all leaves agree in their leading axes and, if they have one, in their feature axis."""
    extras = set()
    for param, leaf in floating:
        shape = tuple(leaf.shape)
        body, features = (shape[:-1], shape[-1:]) if has_features else (shape, ())
        rank = len(param.shape)
        lead = body[: len(body) - rank] if len(body) >= rank else None
        if lead is None or (has_features and not features) or body[len(lead) :] != param.shape:
            return False
        extras.add((lead, features))
    return len(extras) == 1


def _raise_shape_error(floating: list[tuple[Any, Any]]) -> None:
    for param, leaf in floating:
        if not (_reading_fits([(param, leaf)], True) or _reading_fits([(param, leaf)], False)):
            raise ValueError(
                f"parameter {format_path(param.path)}: expected shape {param.shape} (with leading batch axes or a "
                f"trailing feature axis), received {tuple(leaf.shape)}"
            )
    shapes = ", ".join(f"{format_path(p.path)} {p.shape} received {tuple(leaf.shape)}" for p, leaf in floating)
    raise ValueError(f"the leaves do not share the same batch axes and feature axis: {shapes}")


def _read_view(leaf: Array, view: ParamView) -> Array:
    """`[..., *param.shape, F]` to `[..., blocks, source, target, kernel, F]`."""
    rank = len(view.sizes)
    num_lead = leaf.ndim - rank - 1
    lead, features = leaf.shape[:num_lead], leaf.shape[-1]
    window = tuple(slice(a, a + n) for a, n in zip(view.starts, view.sizes, strict=True))
    block = leaf[(..., *window, slice(None))].reshape(*lead, *view.factors, features)
    order = _factor_order(view)
    block = block.transpose(*range(num_lead), *(num_lead + i for i in order), num_lead + len(order))
    return block.reshape(*lead, *view.shape, features)


def _write_view(block: Array, view: ParamView, num_lead: int) -> Array:
    """The inverse of `_read_view`: an array of the block's shape in the parameter."""
    lead, features = block.shape[:num_lead], block.shape[-1]
    factors, order = view.factors, _factor_order(view)
    block = block.reshape(*lead, *(factors[i] for i in order), features)
    inverse = np.argsort(order)
    block = block.transpose(*range(num_lead), *(num_lead + int(i) for i in inverse), num_lead + len(order))
    return block.reshape(*lead, *view.sizes, features)


def _factor_order(view: ParamView) -> list[int]:
    used = [*view.block, *view.source, *view.target, *view.kernel]
    unused = [i for i in range(len(view.factors)) if i not in used]  # of length one
    return [*unused, *used]


def _assemble(parts: list[tuple[ParamView, Array]], shape: tuple[int, ...], num_lead: int) -> Array:
    blocks = [(view, _write_view(array, view, num_lead)) for view, array in parts]
    if len(blocks) == 1:  # one home holds the whole leaf
        return blocks[0][1].reshape(shape)
    leaf = jnp.zeros(shape, blocks[0][1].dtype)
    for view, block in blocks:
        start = (0,) * num_lead + view.starts + (0,)
        leaf = jax.lax.dynamic_update_slice(leaf, block, start)
    return leaf


def _check_groups(spec: NeuralGraphSpec, grouped: GroupedGraph) -> None:
    expected = [(*spec.edge_block_shape(group), group.kernel_size) for group in spec.edge_groups]
    received = [tuple(array.shape[-5:-1]) for array in grouped.edges]
    if grouped.nodes.shape[-2] != spec.num_nodes or received != expected:
        raise ValueError(
            f"the graph is of another architecture: expected {spec.num_nodes} nodes and edge groups {expected}, "
            f"received {grouped.nodes.shape[-2]} nodes and {received}"
        )


# -- groups to the edge list and back ---------------------------------------------------------------------------------


def to_graph(spec: NeuralGraphSpec, params: Any, *, feature_axis: bool | None = None) -> jraph.GraphsTuple:
    """The weights as a `jraph.GraphsTuple` with `NodeData`, `EdgeData` and `GlobalData`.

    Arguments and errors are those of `to_groups`. Leading batch axes of the leaves stand in front of the features alone:
    the wiring is the same for all.
    """
    return flatten_groups(spec, to_groups(spec, params, feature_axis=feature_axis))


def flatten_groups(spec: NeuralGraphSpec, grouped: GroupedGraph) -> jraph.GraphsTuple:
    """The edge list of a grouped graph: edge groups in the spec's order, each row-major in (block, source, target)."""
    num_nodes, num_edges = spec.num_nodes, spec.num_edges
    grid = spec.kernel_grid
    lead = grouped.nodes.shape[:-2]
    num_features = grouped.edges[0].shape[-1] if grouped.edges else grouped.nodes.shape[-1]
    flat, masks, senders, receivers = [], [], [], []
    for group, array in zip(spec.edge_groups, grouped.edges, strict=True):
        size = spec.edge_group_size(group)
        kernel = pad_kernel_shape(group.kernel_shape)
        padding = _kernel_padding(kernel, grid)
        block = array.reshape(*lead, size, *kernel, num_features)
        block = jnp.pad(block, [(0, 0)] * (len(lead) + 1) + padding + [(0, 0)])
        flat.append(block.reshape(*lead, size, math.prod(grid), num_features))
        valid = jnp.pad(jnp.ones(kernel, bool), padding).reshape(1, -1)
        masks.append(jnp.broadcast_to(valid, (size, math.prod(grid))))
        source, target = _edge_ends(spec, group)
        senders.append(source)
        receivers.append(target)
    nodes = NodeData(
        features=grouped.nodes,
        mask=jnp.ones(num_nodes, bool),
        graph=jnp.zeros(num_nodes, jnp.int32),
        **node_fields(spec),
    )
    empty = grouped.nodes.dtype
    edges = EdgeData(
        features=jnp.concatenate(flat, axis=-3) if flat else jnp.zeros((*lead, 0, 1, num_features), empty),
        mask=jnp.concatenate(masks) if masks else jnp.zeros((0, 1), bool),
        offsets=kernel_offsets(grid),
    )
    per_graph = {
        name: None if value is None else jnp.expand_dims(value, len(lead))
        for name, value in grouped.globals._asdict().items()
    }
    per_graph["mask"] = jnp.ones(1, bool)
    per_graph["node_index"] = jnp.arange(num_nodes, dtype=jnp.int32)[None]
    return jraph.GraphsTuple(
        nodes=nodes,
        edges=edges,
        senders=jnp.concatenate(senders) if senders else jnp.zeros(0, jnp.int32),
        receivers=jnp.concatenate(receivers) if receivers else jnp.zeros(0, jnp.int32),
        globals=GlobalData(**per_graph),
        n_node=jnp.array([num_nodes], jnp.int32),
        n_edge=jnp.array([num_edges], jnp.int32),
    )


def group_graph(spec: NeuralGraphSpec, graph: jraph.GraphsTuple) -> GroupedGraph:
    """The inverse of `flatten_groups`, for one graph of this architecture with any leading batch axes.

    Raises:
      ValueError: the graph has other numbers of nodes, edges or kernel positions than the spec.
    """
    features, nodes = graph.edges.features, graph.nodes.features
    grid = tuple(graph.edges.offsets.shape[-4:-1])
    if (
        nodes.shape[-2] != spec.num_nodes
        or features.shape[-3] != spec.num_edges
        or grid != spec.kernel_grid
        or features.shape[-2] != math.prod(grid)
    ):
        raise ValueError(
            f"the graph is of another architecture (or a batch of several): expected {spec.num_nodes} nodes, "
            f"{spec.num_edges} edges and a kernel grid {spec.kernel_grid}, received {nodes.shape[-2]} nodes, "
            f"{features.shape[-3]} edges and {grid}"
        )
    lead, num_features = features.shape[:-3], features.shape[-1]
    edges, start = [], 0
    for group in spec.edge_groups:
        stop = start + spec.edge_group_size(group)
        kernel = pad_kernel_shape(group.kernel_shape)
        window = tuple(
            slice(before, before + k) for (before, _), k in zip(_kernel_padding(kernel, grid), kernel, strict=True)
        )
        block = features[..., start:stop, :, :].reshape(*lead, stop - start, *grid, num_features)
        block = block[(..., *window, slice(None))]
        edges.append(block.reshape(*lead, *spec.edge_block_shape(group), -1, num_features))
        start = stop
    per_graph = {
        name: None if value is None or name in ("mask", "node_index") else jnp.squeeze(value, axis=len(lead))
        for name, value in graph.globals._asdict().items()
    }
    return GroupedGraph(nodes, tuple(edges), GlobalData(**per_graph))


def node_fields(spec: NeuralGraphSpec) -> dict[str, Int[Array, " N"]]:
    """What the spec says of each node: `role`, `group`, `position`, `activation`, `level`."""
    columns: dict[str, list[Array]] = {name: [] for name in ("role", "group", "position", "activation", "level")}
    for i, group in enumerate(spec.node_groups):
        base = spec.position_bases[group.name]
        step = 0 if group.slots == 1 else 1
        constants = {
            "role": ROLES.index(group.role),
            "group": i,
            "activation": ACTIVATIONS.index(group.activation),
            "level": group.level,
        }
        for name, value in constants.items():
            columns[name].append(jnp.full(group.size, value, jnp.int32))
        columns["position"].append(base + step * jnp.arange(group.size, dtype=jnp.int32))
    return {name: jnp.concatenate(parts) for name, parts in columns.items()}


def kernel_offsets(grid: tuple[int, int, int]) -> Int[Array, "Kz Ky Kx 3"]:
    """Offset of each position of a kernel grid from its centre, position `k // 2` along an axis of length `k`."""
    axes = [jnp.arange(k, dtype=jnp.int32) - k // 2 for k in grid]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)


def _kernel_padding(kernel: tuple[int, ...], grid: tuple[int, ...]) -> list[tuple[int, int]]:
    """Zeros before and after a kernel that put its centre on the grid's."""
    before = [g // 2 - k // 2 for k, g in zip(kernel, grid, strict=True)]
    return [(b, g - k - b) for b, k, g in zip(before, kernel, grid, strict=True)]


def _edge_ends(spec: NeuralGraphSpec, group: EdgeGroup) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
    shape = spec.edge_block_shape(group)
    block, i, o = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    source = spec.node_slices[group.source].start + block * shape[1] + i
    target = spec.node_slices[group.target].start + block * shape[2] + o
    return source.reshape(-1), target.reshape(-1)
