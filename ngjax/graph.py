"""Weights as a graph and back: `(spec, params) <-> GroupedGraph <-> jraph.GraphsTuple`.

The arrays of each edge group in their own shape (`GroupedGraph`) are the truth, and what functions that know the spec
work on. The edge list (`jraph.GraphsTuple`) with one common kernel grid is a view of them, made where networks of
different architecture share a batch. All of it is pure and works under `jit`, `vmap` and `grad`; index arrays are made
in the program.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from ngjax.actions import orbits
from ngjax.spec import (
    ACTIVATIONS,
    ROLES,
    EdgeGroup,
    NeuralGraphSpec,
    NodeLayout,
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
      probes: values of all neurons at the learned probe inputs, put there by a model; `...` never has the graphs.
      token: the class token, put there by NG-T.
      pairs: features of all ordered pairs of nodes, put there by NG-T.
    """

    loose: Float[Array, "... S F"]
    mask: Bool[Array, " G"] | None = None
    node_index: Int[Array, "G M"] | None = None
    probes: Float[Array, "... N P"] | None = None
    token: Float[Array, "... D"] | None = None
    pairs: Float[Array, "... M M C"] | None = None


_PER_GRAPH = ("loose", "token", "pairs")  # fields with an axis for the graphs of an edge list


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
    Which of the two an extra axis is, is read off the shapes; where both readings fit every leaf (a batch of `n`
    networks all of whose layers have width `n`), it is a batch axis.

    Args:
      spec: of the architecture.
      params: the parameter pytree.
      feature_axis: whether leaves end with a feature axis; `None` reads it off the shapes.

    Raises:
      ValueError: the leaves are not those of the spec, naming the first that differs.
      TypeError: a complex leaf, or one that is no array.
    """
    leaves, has_features = _floating_leaves(spec, params, feature_axis)
    # Nodes and edges share one dtype that holds all leaves exactly, also for users who forbid implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in leaves if leaf is not None))
    return _read_groups(spec, leaves, has_features, dtype)


# Compiled as one program also outside of jit: one operation after the other, the first call takes ten times as long.
@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _read_groups(spec: NeuralGraphSpec, leaves: list[Any], has_features: bool, dtype: jnp.dtype) -> GroupedGraph:
    leaves = [leaf if leaf is None or has_features else leaf[..., None] for leaf in leaves]
    lead = next(
        leaf.shape[: leaf.ndim - len(p.shape) - 1]
        for leaf, p in zip(leaves, spec.params, strict=True)
        if leaf is not None
    )
    num_features = next(leaf.shape[-1] for leaf in leaves if leaf is not None)

    def block(view: ParamView) -> Array:
        return _read_view(leaves[view.param], view).astype(dtype)

    nodes = [jnp.zeros((*lead, 0, num_features), dtype)]  # a spec may have loose scalars alone
    nodes += [
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
    num_features = grouped.nodes.shape[-1]
    keep_features = num_features != 1 if feature_axis is None else feature_axis
    if num_features != 1 and not keep_features:
        raise ValueError(f"feature_axis=False needs a graph with one feature, received {num_features}")
    homeless = next((param for param in spec.params if not param.is_floating), None)
    if like is None and homeless is not None:
        raise ValueError(
            f"parameter {format_path(homeless.path)} is {homeless.dtype} and has no home in the graph: pass like= with "
            "a pytree that holds it"
        )
    given: list[Any] = [None] * len(spec.params) if like is None else spec.flatten(like)
    mixed = len({param.dtype for param in spec.params if param.is_floating}) > 1
    dtypes: list[Any] = [leaf.dtype for leaf in given] if like is not None else [p.dtype for p in spec.params]
    # Without x64 a float64 leaf (of numpy, say) became float32 on its way into JAX, and stays so.
    kept = tuple(
        jax.dtypes.canonicalize_dtype(dtype) if p.is_floating and (mixed or like is not None) else None
        for p, dtype in zip(spec.params, dtypes, strict=True)
    )
    leaves = _write_leaves(spec, grouped, keep_features, kept)
    leaves = [leaf if p.is_floating else old for p, leaf, old in zip(spec.params, leaves, given, strict=True)]
    return spec.unflatten(leaves, like=like)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _write_leaves(
    spec: NeuralGraphSpec, grouped: GroupedGraph, keep_features: bool, dtypes: tuple[Any, ...]
) -> list[Array | None]:
    """The floating leaves, each of the given dtype (`None` for the graph's), and `None` for the others."""
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

    leaves: list[Array | None] = [None] * len(spec.params)
    for i, parts in homes.items():
        leaf = _assemble(parts, (*lead, *spec.params[i].shape, num_features), len(lead))
        leaf = leaf if keep_features else leaf[..., 0]
        leaves[i] = leaf if dtypes[i] is None else leaf.astype(dtypes[i])
    return leaves


def _floating_leaves(spec: NeuralGraphSpec, params: Any, feature_axis: bool | None) -> tuple[list[Any], bool]:
    """Floating leaves (`None` for the others), and whether they end with a feature axis."""
    leaves = spec.flatten(params)
    floating = [(p, leaf) for p, leaf in zip(spec.params, leaves, strict=True) if p.is_floating]
    for param, leaf in floating:
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"parameter {format_path(param.path)}: expected an array, received {type(leaf).__name__}")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"parameter {format_path(param.path)}: expected a floating array, received {leaf.dtype}")
    readings = (False, True) if feature_axis is None else (feature_axis,)
    has_features = next((r for r in readings if _reading_fits(floating, r)), None)
    if has_features is None:
        _raise_shape_error(floating)
    return [leaf if p.is_floating else None for p, leaf in zip(spec.params, leaves, strict=True)], has_features


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


def _raise_shape_error(floating: list[tuple[Any, Any]]) -> NoReturn:
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
    window = tuple(slice(a, a + n) if view.is_slice(i) else slice(None) for i, (a, n) in enumerate(_window(view)))
    block = leaf[(..., *window, slice(None))]
    for axis in range(rank):
        if not view.is_slice(axis):
            block = jnp.take(block, view.places(axis), axis=num_lead + axis)
    block = block.reshape(*lead, *view.factors, features)
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


def _window(view: ParamView) -> list[tuple[int, int]]:
    """Start and size along each axis of the parameter."""
    return list(zip(view.starts, view.sizes, strict=True))


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
        axes = range(len(view.sizes))
        if all(view.is_slice(axis) for axis in axes):
            leaf = jax.lax.dynamic_update_slice(leaf, block, (0,) * num_lead + view.starts + (0,))
        else:
            places = np.ix_(*(view.places(axis) for axis in axes))
            leaf = leaf.at[(*[slice(None)] * num_lead, *places)].set(block)
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

    Arguments and errors are those of `to_groups`. Leading batch axes of the leaves stand in front of the features
    alone: the wiring is the same for all.
    """
    return flatten_groups(spec, to_groups(spec, params, feature_axis=feature_axis))


@functools.partial(jax.jit, static_argnums=0)
def flatten_groups(spec: NeuralGraphSpec, grouped: GroupedGraph) -> jraph.GraphsTuple:
    """The edge list of a grouped graph: edge groups in the spec's order, each row-major in (block, source, target)."""
    num_nodes, num_edges = spec.num_nodes, spec.num_edges
    grid = spec.kernel_grid
    lead = grouped.nodes.shape[:-2]
    num_features = grouped.edges[0].shape[-1] if grouped.edges else grouped.nodes.shape[-1]
    one_per_edge = all(array.shape[-2] == 1 for array in grouped.edges)  # a model's features, whatever the kernels
    flat, masks, senders, receivers = [], [], [], []
    for group, array in zip(spec.edge_groups, grouped.edges, strict=True):
        size = spec.edge_group_size(group)
        kernel = pad_kernel_shape(group.kernel_shape)
        padding = kernel_padding(kernel, grid)
        if one_per_edge:
            block = array.reshape(*lead, size, 1, num_features)
        else:
            block = array.reshape(*lead, size, *kernel, num_features)
            block = jnp.pad(block, [(0, 0)] * (len(lead) + 1) + padding + [(0, 0)])
            block = block.reshape(*lead, size, math.prod(grid), num_features)
        flat.append(block)
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
        name: jnp.expand_dims(value, len(lead)) if name in _PER_GRAPH and value is not None else value
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


@functools.partial(jax.jit, static_argnums=0)
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
        or features.shape[-2] not in (1, math.prod(grid))
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
            slice(before, before + k) for (before, _), k in zip(kernel_padding(kernel, grid), kernel, strict=True)
        )
        block = features[..., start:stop, :, :]
        if features.shape[-2] != 1:  # else one vector per edge, a model's features
            block = block.reshape(*lead, stop - start, *grid, num_features)[(..., *window, slice(None))]
        edges.append(block.reshape(*lead, *spec.edge_block_shape(group), -1, num_features))
        start = stop
    per_graph = {
        name: jnp.squeeze(value, axis=len(lead)) if name in _PER_GRAPH and value is not None else value
        for name, value in graph.globals._asdict().items()
    }
    per_graph |= {"mask": None, "node_index": None}
    return GroupedGraph(nodes, tuple(edges), GlobalData(**per_graph))


def node_fields(spec: NeuralGraphSpec) -> dict[str, Int[Array, " N"]]:
    """What the spec says of each node: `role`, `group`, `position`, `activation`, `level`."""
    columns: dict[str, list[Array]] = {name: [] for name in ("role", "group", "position", "activation", "level")}
    for i, group in enumerate(spec.node_groups):
        base = spec.position_bases[group.name]
        constants = {
            "role": ROLES.index(group.role),
            "group": i,
            "activation": ACTIVATIONS.index(group.activation),
            "level": group.level,
        }
        for name, value in constants.items():
            columns[name].append(jnp.full(group.size, value, jnp.int32))
        slot = jnp.zeros(group.size, jnp.int32) if group.slots == 1 else jnp.asarray(orbits(spec.action, group.axis))
        columns["position"].append(base + slot)
    return {name: jnp.concatenate(parts) for name, parts in columns.items()}


def kernel_offsets(grid: tuple[int, int, int]) -> Int[Array, "Kz Ky Kx 3"]:
    """Offset of each position of a kernel grid from its centre, position `k // 2` along an axis of length `k`."""
    axes = [jnp.arange(k, dtype=jnp.int32) - k // 2 for k in grid]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)


def kernel_padding(kernel: tuple[int, ...], grid: tuple[int, ...]) -> list[tuple[int, int]]:
    """Zeros before and after a kernel that put its centre on the grid's."""
    before = [g // 2 - k // 2 for k, g in zip(kernel, grid, strict=True)]
    return [(b, g - k - b) for b, k, g in zip(before, kernel, grid, strict=True)]


def _edge_ends(spec: NeuralGraphSpec, group: EdgeGroup) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
    shape = spec.edge_block_shape(group)
    places = []
    for name, layout, axis in ((group.source, group.source_layout, -1), (group.target, group.target_layout, -2)):
        nodes = spec.node_slices[name].start + jnp.arange(spec.node_group[name].size, dtype=jnp.int32)
        blocks = split_nodes(nodes[:, None], group.blocks, layout)[..., 0]
        places.append(jnp.broadcast_to(jnp.expand_dims(blocks, axis), shape).reshape(-1))
    return places[0], places[1]


def split_nodes(
    nodes: Shaped[Array, "... n d"], blocks: int, layout: NodeLayout | None = None
) -> Shaped[Array, "... blocks m d"]:
    """The nodes of one group as an edge group's `[..., blocks, neurons of a block, d]`."""
    if layout is not None:
        lead, order = nodes.ndim - 2, (*layout.block, *layout.rest)
        nodes = nodes.reshape(*nodes.shape[:-2], *layout.splits, nodes.shape[-1])
        nodes = nodes.transpose(*range(lead), *(lead + i for i in order), nodes.ndim - 1)
        nodes = nodes.reshape(*nodes.shape[:lead], -1, nodes.shape[-1])
    return nodes.reshape(*nodes.shape[:-2], blocks, nodes.shape[-2] // blocks, nodes.shape[-1])


def join_nodes(blocked: Shaped[Array, "... blocks m d"], layout: NodeLayout | None = None) -> Shaped[Array, "... n d"]:
    """The inverse of `split_nodes`."""
    *lead, blocks, size, width = blocked.shape
    if layout is None:
        return blocked.reshape(*lead, blocks * size, width)
    order = [*layout.block, *layout.rest]
    factors = blocked.reshape(*lead, *(layout.splits[i] for i in order), width)
    inverse = [len(lead) + order.index(i) for i in range(len(order))]
    factors = factors.transpose(*range(len(lead)), *inverse, factors.ndim - 1)
    return factors.reshape(*lead, blocks * size, width)
