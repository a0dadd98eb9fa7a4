"""Static description of a network's weights as a graph: what is a node, what is an edge, what may be permuted.

A `NeuralGraphSpec` says, for one architecture, where every scalar of a parameter pytree lives in the neural graph (a
node slot, an edge slot or the list of loose scalars) and how each axis of each parameter moves when hidden neurons are
shuffled. It holds no arrays, is hashable and equal by value, so it can be a static argument of `jax.jit`.

Two small languages make this up:

* A `ParamView` reads a rectangular block of one parameter as `[blocks, source, target, kernel]`. Dense layers have one
  block; diagonal connections (normalization scales, residuals, depthwise kernels) have as many blocks as neurons and
  one source and one target in each; grouped layers are in between.
* An `AxisAction` says how one axis moves. Independent permutations are the letters; `product` (heads x inner dimension,
  channels x positions, groups x channels of a group) and `concat` (DenseNet features, fused query/key/value, gates)
  build words from them. A permutation may differ from place to place along another axis (`per`): the inner dimension of
  each head, the channels of each group, each slice of a stacked weight.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Role = Literal["input", "hidden", "output"]
ROLES: tuple[Role, ...] = ("input", "hidden", "output")

# The first seven in the order of the activation table of Kofinas et al. (2024), CNN Wild Park. `siren` is sin(30 x), as
# every public INR zoo has it; another frequency w is `sine` with the weights and biases of that layer multiplied by w.
ACTIVATIONS: tuple[str, ...] = (
    "none",
    "relu",
    "gelu",
    "silu",
    "tanh",
    "sigmoid",
    "leaky_relu",
    "sine",
    "siren",
    "elu",
    "selu",
    "softplus",
    "relu6",
    "hard_tanh",
    "hard_sigmoid",
    "hard_swish",
    "mish",
    "log_sigmoid",
    "softmax",
    "other",
)

_FORMAT = "ngjax.spec"
_VERSION = 1


class PathKey(NamedTuple):
    """One step into a pytree: the kind of container and the key in it."""

    kind: Literal["dict", "list", "tuple", "attr"]
    key: Any


Path = tuple[PathKey, ...]


def format_path(path: Path) -> str:
    """`layer_0/kernel`, as error messages and tables show it."""
    return "/".join(str(step.key) for step in path) or "<root>"


class ParamSpec(NamedTuple):
    """One leaf of the parameter pytree. `axes` holds one action id per axis, and is empty for a leaf without a home."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...] = ()

    @property
    def is_floating(self) -> bool:
        return bool(jnp.issubdtype(self.dtype, jnp.floating))


class ParamView(NamedTuple):
    """A rectangular block of parameter number `param`, read as `[blocks, source, target, kernel]`.

    The block starts at `starts` and has `sizes`; each axis is split into factors (`splits`, row-major), numbered through
    all axes; `block`, `source`, `target` and `kernel` list the factors that make up each of the four axes of the view, in
    order. Factors named nowhere have size one.
    """

    param: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    splits: tuple[tuple[int, ...], ...]
    block: tuple[int, ...] = ()
    source: tuple[int, ...] = ()
    target: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()

    @property
    def factors(self) -> tuple[int, ...]:
        return tuple(itertools.chain.from_iterable(self.splits))

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return tuple(self.factors[i] for i in self.kernel)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Lengths of `[blocks, source, target, kernel]`."""
        factors = self.factors
        block, source, target, kernel = (
            math.prod(factors[i] for i in roles) for roles in (self.block, self.source, self.target, self.kernel)
        )
        return block, source, target, kernel


def whole_param(
    param: int,
    shape: Sequence[int],
    *,
    block: Iterable[int] = (),
    source: Iterable[int] = (),
    target: Iterable[int] = (),
    kernel: Iterable[int] = (),
) -> ParamView:
    """The view of a whole parameter whose axes are used unsplit."""
    shape = tuple(shape)
    return ParamView(
        param,
        starts=(0,) * len(shape),
        sizes=shape,
        splits=tuple((n,) for n in shape),
        block=tuple(block),
        source=tuple(source),
        target=tuple(target),
        kernel=tuple(kernel),
    )


class NodeGroup(NamedTuple):
    """The neurons of one layer.

    Attributes:
      name: unique name.
      size: number of neurons.
      role: inputs and outputs keep their order, hidden neurons are exchangeable.
      level: depth in the network; inputs have level 0.
      activation: one of `ACTIVATIONS`, applied to the neurons' values.
      slots: position embeddings the group uses: `size` (each neuron its own) or 1 (one shared by the group).
      bias: the parameter that gives the node feature, `None` for a feature of zero.
    """

    name: str
    size: int
    role: Role
    level: int
    activation: str = "none"
    slots: int = 1
    bias: ParamView | None = None


class EdgeGroup(NamedTuple):
    """The weights of one parameter (or of a block of it), from the neurons of `source` to those of `target`.

    Attributes:
      name: unique name.
      source, target: names of node groups.
      blocks: 1 for dense (every pair), the group's size for diagonal (one to one), the number of groups for grouped.
      view: the parameter, or `None` for a connection without one (a residual), whose weight is `constant`.
      constant: the weight of every edge where there is no parameter.
      mirror: a later use of a parameter that already has its home; read into graphs, never written back.
    """

    name: str
    source: str
    target: str
    blocks: int = 1
    view: ParamView | None = None
    constant: float = 1.0
    mirror: bool = False

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return () if self.view is None else self.view.kernel_shape

    @property
    def kernel_size(self) -> int:
        return math.prod(self.kernel_shape)


class AxisAction(NamedTuple):
    """How an axis moves under a permutation of neurons.

    Kinds: `permutation` (an independent one), `fixed` (pinned; `reason` says by what), `product` (the axis is the
    row-major product of `parts`) and `concat` (`parts` one after the other). `per` names the ids on whose place the
    permutation depends; products bind the places of their earlier parts, everything else is bound by the other axes of
    the parameter.
    """

    id: str
    size: int
    kind: Literal["permutation", "fixed", "product", "concat"]
    parts: tuple[str, ...] = ()
    per: tuple[str, ...] = ()
    reason: str = ""


def permutation(id: str, size: int, *, per: Iterable[str] = ()) -> AxisAction:
    """An independent permutation of `size` neurons, one for each place along the axes `per`."""
    return AxisAction(id, size, "permutation", per=tuple(per))


def fixed(id: str, size: int, reason: str) -> AxisAction:
    """An axis that nothing moves, and why."""
    return AxisAction(id, size, "fixed", reason=reason)


def product(id: str, parts: Sequence[AxisAction]) -> AxisAction:
    """The row-major product of the parts' axes."""
    return AxisAction(id, math.prod(p.size for p in parts), "product", parts=tuple(p.id for p in parts))


def concat(id: str, parts: Sequence[AxisAction]) -> AxisAction:
    """The parts' axes one after the other; a part may come several times and then moves the same way each time."""
    return AxisAction(id, sum(p.size for p in parts), "concat", parts=tuple(p.id for p in parts))


class AxisIds(tuple):
    """Ids of a parameter's axes, `None` where an axis is pinned. A tuple that JAX treats as a leaf."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"AxisIds{super().__repr__()}"


class PinnedAxes(NamedTuple):
    """Axes that share one pinned id: which, and what pinned them."""

    id: str
    reason: str
    axes: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class NeuralGraphSpec:
    """Where the scalars of a parameter pytree live in the neural graph, and which permutations leave it unchanged.

    Immutable, hashable, equal by value. Build one with `mlp_spec`, `infer_spec` or by hand; the constructor checks that
    the parts fit together and that every floating scalar has exactly one home.

    Attributes:
      params: the leaves of the pytree, in `jax.tree` order.
      node_groups: inputs first, outputs last, levels not decreasing in between.
      edge_groups: in order of the edge list.
      actions: how axes move; every id that `params` or other actions name.
      loose: scalars with no place in the graph (temperatures, tables), in path order.
      treedef: how to rebuild the pytree; left out of equality, and rebuilt from the paths when missing.
    """

    params: tuple[ParamSpec, ...]
    node_groups: tuple[NodeGroup, ...]
    edge_groups: tuple[EdgeGroup, ...]
    actions: tuple[AxisAction, ...]
    loose: tuple[ParamView, ...] = ()
    treedef: jax.tree_util.PyTreeDef | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_params(self)
        _check_actions(self)
        _check_nodes(self)
        _check_edges(self)
        _check_homes(self)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.params, self.node_groups, self.edge_groups, self.actions, self.loose))

    @property
    def num_nodes(self) -> int:
        return sum(group.size for group in self.node_groups)

    @property
    def num_edges(self) -> int:
        """Edges from source to target; reverse edges are a choice of the model and not counted."""
        return sum(self.edge_group_size(group) for group in self.edge_groups)

    @property
    def num_loose(self) -> int:
        return sum(view.shape[2] for view in self.loose)

    @functools.cached_property
    def action(self) -> dict[str, AxisAction]:
        """Actions by id."""
        return {action.id: action for action in self.actions}

    @functools.cached_property
    def node_slices(self) -> dict[str, slice]:
        """Place of each node group in the node list, by name."""
        stops = list(itertools.accumulate(group.size for group in self.node_groups))
        return {group.name: slice(stop - group.size, stop) for group, stop in zip(self.node_groups, stops, strict=True)}

    @functools.cached_property
    def node_group(self) -> dict[str, NodeGroup]:
        """Node groups by name."""
        return {group.name: group for group in self.node_groups}

    def edge_block_shape(self, group: EdgeGroup) -> tuple[int, int, int]:
        """Lengths of `[blocks, source neurons of a block, target neurons of a block]`."""
        source, target = self.node_group[group.source].size, self.node_group[group.target].size
        return group.blocks, source // group.blocks, target // group.blocks

    def edge_group_size(self, group: EdgeGroup) -> int:
        """Number of edges of the group."""
        return math.prod(self.edge_block_shape(group))

    @functools.cached_property
    def position_bases(self) -> dict[str, int]:
        """First position of each node group among the groups of its role, by name."""
        bases, used = {}, dict.fromkeys(ROLES, 0)
        for group in self.node_groups:
            bases[group.name] = used[group.role]
            used[group.role] += group.slots
        return bases

    def num_positions(self, role: Role) -> int:
        """Position slots that the groups of a role use together."""
        return sum(group.slots for group in self.node_groups if group.role == role)

    @functools.cached_property
    def max_level(self) -> int:
        return max(group.level for group in self.node_groups)

    @functools.cached_property
    def kernel_grid(self) -> tuple[int, int, int]:
        """Common kernel size: the largest along each of three spatial axes (fewer are counted from the last)."""
        shapes = [pad_kernel_shape(group.kernel_shape) for group in self.edge_groups]
        return tuple(max((s[i] for s in shapes), default=1) for i in range(3))  # type: ignore[return-value]

    def is_free(self, id: str) -> bool:
        """Whether anything moves along an axis with this id."""
        action = self.action[id]
        if action.kind in ("product", "concat"):
            return any(self.is_free(part) for part in action.parts)
        return action.kind == "permutation"

    @functools.cached_property
    def symmetry(self) -> Any:
        """A pytree like the parameters whose leaves are `AxisIds`: one id per axis, `None` where it is pinned."""
        ids = [AxisIds(id if self.is_free(id) else None for id in param.axes) for param in self.params]
        return self.unflatten(ids)

    @functools.cached_property
    def pinned(self) -> tuple[PinnedAxes, ...]:
        """Ids that cannot move, with the axes that carry them and what pinned them."""
        axes: dict[str, list[tuple[str, int]]] = {}
        for param in self.params:
            for axis, id in enumerate(param.axes):
                if not self.is_free(id):
                    axes.setdefault(id, []).append((format_path(param.path), axis))
        return tuple(PinnedAxes(id, self._pinned_reason(id), tuple(where)) for id, where in axes.items())

    def _pinned_reason(self, id: str) -> str:
        action = self.action[id]
        reasons = [action.reason, *(self._pinned_reason(part) for part in action.parts)]
        return ", ".join(dict.fromkeys(reason for reason in reasons if reason))

    # -- pytrees ----------------------------------------------------------------------------------------------------

    def flatten(self, params: Any) -> list[Any]:
        """The leaves of `params` in the order of `self.params`, found by path.

        Raises:
          ValueError: a leaf is missing or not part of the spec (another architecture).
        """
        leaves = {path_keys(path): leaf for path, leaf in flatten_with_path(params)[0]}
        expected = {path_keys(param.path): param for param in self.params}
        for plain, param in expected.items():
            if plain not in leaves:
                raise ValueError(
                    f"parameter {format_path(param.path)} {param.shape} of the spec is missing: these parameters are of "
                    f"another architecture; they have {_summary(leaves)}"
                )
        for plain in leaves:
            if plain not in expected:
                raise ValueError(
                    f"parameter {'/'.join(map(str, plain))} is not part of the spec, which has {_summary(expected)}"
                )
        return [leaves[path_keys(param.path)] for param in self.params]

    def unflatten(self, leaves: Sequence[Any], *, like: Any = None) -> Any:
        """A pytree with `leaves` in the order of `self.params`, of the type of `like` where it is given.

        Raises:
          ValueError: the tree holds containers other than dicts, lists and tuples, and neither a treedef nor `like` says
            how to build them.
        """
        if like is not None:
            by_path = {path_keys(p.path): leaf for p, leaf in zip(self.params, leaves, strict=True)}
            self.flatten(like)  # the same paths, or an error that names the one that differs
            paths, treedef = flatten_with_path(like)
            return jax.tree.unflatten(treedef, [by_path[path_keys(path)] for path, _ in paths])
        if self.treedef is not None:
            return jax.tree.unflatten(self.treedef, leaves)
        return _nest([param.path for param in self.params], list(leaves))

    # -- text -------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """JSON text with a format version; `from_json` reads it back."""
        fields = {name: getattr(self, name) for name in ("params", "node_groups", "edge_groups", "actions", "loose")}
        return json.dumps(
            {"format": _FORMAT, "version": _VERSION}
            | {name: [_jsonable(item) for item in items] for name, items in fields.items()}
        )

    @classmethod
    def from_json(cls, text: str) -> NeuralGraphSpec:
        """The spec that `to_json` wrote.

        Raises:
          ValueError: not such a text, or of a version this library does not know.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a spec: {error}") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f"not a spec: expected an object with format {_FORMAT!r}")
        if data.get("version") != _VERSION:
            raise ValueError(f"spec of format version {data.get('version')!r}; this library reads version {_VERSION}")
        try:
            return cls(
                params=tuple(_param_from_json(item) for item in data["params"]),
                node_groups=tuple(_node_from_json(item) for item in data["node_groups"]),
                edge_groups=tuple(_edge_from_json(item) for item in data["edge_groups"]),
                actions=tuple(AxisAction(**_tupled(item)) for item in data["actions"]),
                loose=tuple(ParamView(**_tupled(item)) for item in data["loose"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a spec: a field is missing or unknown ({error})") from None

    def __str__(self) -> str:
        return _table(self)


def check_activation(name: str) -> None:
    """Raises a ValueError that lists the known activations."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known are {', '.join(ACTIVATIONS)}")


def pad_kernel_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """A kernel shape of up to three spatial axes as one of three: `(3, 5)` becomes `(1, 3, 5)`.

    Raises:
      ValueError: more than three axes.
    """
    if len(shape) > 3:
        raise ValueError(f"kernels have at most three spatial axes; received shape {tuple(shape)}")
    z, y, x = (1,) * (3 - len(shape)) + tuple(shape)
    return z, y, x


# -- pytrees with named paths --------------------------------------------------------------------------------------


def flatten_with_path(tree: Any) -> tuple[list[tuple[Path, Any]], jax.tree_util.PyTreeDef]:
    """`jax.tree_util.tree_flatten_with_path` with `PathKey`s, which tell lists from tuples."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [(_path(tree, keys), leaf) for keys, leaf in pairs], treedef


def _path(tree: Any, keys: tuple[Any, ...]) -> Path:
    path = []
    node = tree
    for key in keys:
        if isinstance(key, jax.tree_util.DictKey):
            path.append(PathKey("dict", key.key))
            node = _get(node, key.key)
        elif isinstance(key, jax.tree_util.SequenceKey):
            path.append(PathKey("tuple" if type(node) is tuple else "list", key.idx))
            node = _get(node, key.idx)
        else:
            name = getattr(key, "name", getattr(key, "key", str(key)))
            path.append(PathKey("attr", name))
            node = getattr(node, name, None) if isinstance(name, str) else None
    return tuple(path)


def _get(node: Any, key: Any) -> Any:
    try:
        return node[key]
    except (TypeError, KeyError, IndexError):
        return None


def path_keys(path: Path) -> tuple[Any, ...]:
    """The keys alone: a FrozenDict and a dict, a list and a tuple are the same place."""
    return tuple(step.key for step in path)


def _summary(plain_paths: Iterable[tuple[Any, ...]]) -> str:
    names = ["/".join(map(str, plain)) for plain in plain_paths]
    shown = ", ".join(names[:6])
    return f"{shown}, ... ({len(names)} leaves)" if len(names) > 6 else shown


def _nest(paths: Sequence[Path], leaves: Sequence[Any]) -> Any:
    if len(paths) == 1 and not paths[0]:
        return leaves[0]
    kinds = {path[0].kind for path in paths}
    if kinds == {"attr"} or len(kinds) > 1:
        raise ValueError(
            f"the tree holds an object with attribute {paths[0][0].key!r}, which only its own class can rebuild: "
            "pass like= with a pytree of that class"
        )
    children: dict[Any, list[int]] = {}
    for i, path in enumerate(paths):
        children.setdefault(path[0].key, []).append(i)
    built = {
        key: _nest([paths[i][1:] for i in members], [leaves[i] for i in members]) for key, members in children.items()
    }
    kind = kinds.pop()
    if kind == "dict":
        return built
    ordered = [built[key] for key in sorted(built)]
    return ordered if kind == "list" else tuple(ordered)


# -- checks --------------------------------------------------------------------------------------------------------


def _check_params(spec: NeuralGraphSpec) -> None:
    for param in spec.params:
        where = format_path(param.path)
        if jnp.issubdtype(param.dtype, jnp.complexfloating):
            raise TypeError(
                f"parameter {where} is {param.dtype}: complex weights have no place in a neural graph; "
                "split them into real and imaginary leaves"
            )
        if param.is_floating and len(param.axes) != len(param.shape):
            raise ValueError(f"parameter {where}: {len(param.axes)} axis ids for shape {param.shape}")


def _check_actions(spec: NeuralGraphSpec) -> None:
    action = spec.action
    if len(action) != len(spec.actions):
        raise ValueError("two actions share one id")
    for item in spec.actions:
        unknown = [id for id in (*item.parts, *item.per) if id not in action]
        if unknown:
            raise ValueError(f"action {item.id!r} names unknown ids {unknown}")
        sizes = [action[part].size for part in item.parts]
        expected = {"product": math.prod(sizes), "concat": sum(sizes)}.get(item.kind, item.size)
        if expected != item.size:
            raise ValueError(f"action {item.id!r} ({item.kind}) has size {item.size}, but its parts make {expected}")
    for param in spec.params:
        for axis, id in enumerate(param.axes):
            if id not in action or action[id].size != param.shape[axis]:
                received = f"an action of size {action[id].size}" if id in action else "no action"
                raise ValueError(
                    f"parameter {format_path(param.path)}, axis {axis}: expected an action of size {param.shape[axis]}, "
                    f"received {received} for id {id!r}"
                )


def _check_nodes(spec: NeuralGraphSpec) -> None:
    if len(spec.node_group) != len(spec.node_groups):
        raise ValueError("two node groups share one name")
    roles = [ROLES.index(group.role) for group in spec.node_groups]
    if roles != sorted(roles):
        raise ValueError("node groups must be in the order inputs, hidden, outputs")
    for group in spec.node_groups:
        check_activation(group.activation)
        if group.slots not in (1, group.size):
            raise ValueError(
                f"node group {group.name!r}: slots must be 1 or its size {group.size}, received {group.slots}"
            )
        if group.bias is not None:
            _check_view(spec, group.bias, f"bias of {group.name!r}", (1, 1, group.size, 1))


def _check_edges(spec: NeuralGraphSpec) -> None:
    for group in spec.edge_groups:
        for name in (group.source, group.target):
            if name not in spec.node_group:
                raise ValueError(f"edge group {group.name!r} names unknown node group {name!r}")
        for name in (group.source, group.target):
            if spec.node_group[name].size % group.blocks:
                raise ValueError(
                    f"edge group {group.name!r}: {group.blocks} blocks do not divide the "
                    f"{spec.node_group[name].size} neurons of {name!r}"
                )
        if group.view is not None:
            expected = (*spec.edge_block_shape(group), group.kernel_size)
            _check_view(spec, group.view, f"edge group {group.name!r}", expected)
        pad_kernel_shape(group.kernel_shape)


def _check_view(spec: NeuralGraphSpec, view: ParamView, where: str, expected: tuple[int, int, int, int]) -> None:
    if not 0 <= view.param < len(spec.params):
        raise ValueError(f"{where}: there is no parameter number {view.param}")
    param = spec.params[view.param]
    name = format_path(param.path)
    if not param.is_floating:
        raise ValueError(f"{where}: parameter {name} is {param.dtype}, only floating leaves have a home")
    if not len(view.starts) == len(view.sizes) == len(view.splits) == len(param.shape):
        raise ValueError(f"{where}: the view of {name} does not have one entry per axis of {param.shape}")
    for start, size, split, length in zip(view.starts, view.sizes, view.splits, param.shape, strict=True):
        if start < 0 or start + size > length or math.prod(split) != size:
            raise ValueError(
                f"{where}: block {view.starts} + {view.sizes} split as {view.splits} does not fit {name} {param.shape}"
            )
    used = [*view.block, *view.source, *view.target, *view.kernel]
    factors = view.factors
    if len(set(used)) != len(used) or any(n != 1 for i, n in enumerate(factors) if i not in used):
        raise ValueError(f"{where}: every factor of {name} longer than one must be used exactly once")
    if view.shape != expected:
        raise ValueError(
            f"{where}: expected [blocks, source, target, kernel] = {expected}, but {name} gives {view.shape}"
        )


def _check_homes(spec: NeuralGraphSpec) -> None:
    for view in spec.loose:
        _check_view(spec, view, "loose scalars", (1, 1, math.prod(view.sizes), 1))
    homes: dict[int, list[ParamView]] = {}
    for view in _home_views(spec):
        homes.setdefault(view.param, []).append(view)
    for i, param in enumerate(spec.params):
        views = homes.get(i, [])
        total = sum(math.prod(view.sizes) for view in views)
        clash = any(_overlap(a, b) for a, b in itertools.combinations(views, 2))
        if param.is_floating and (clash or total != math.prod(param.shape)):
            raise ValueError(
                f"parameter {format_path(param.path)} {param.shape}: every scalar needs exactly one home, but "
                f"{len(views)} views hold {total} of {math.prod(param.shape)} scalars"
                + (" and overlap" if clash else "")
            )


def _home_views(spec: NeuralGraphSpec) -> list[ParamView]:
    nodes = [group.bias for group in spec.node_groups if group.bias is not None]
    edges = [g.view for g in spec.edge_groups if g.view is not None and not g.mirror]
    return [*nodes, *edges, *spec.loose]


def _overlap(a: ParamView, b: ParamView) -> bool:
    return all(max(i, j) < min(i + m, j + n) for i, m, j, n in zip(a.starts, a.sizes, b.starts, b.sizes, strict=True))


# -- JSON ----------------------------------------------------------------------------------------------------------


def _jsonable(item: Any) -> Any:
    if isinstance(item, tuple) and hasattr(item, "_asdict"):
        return {name: _jsonable(value) for name, value in item._asdict().items()}
    if isinstance(item, tuple):
        return [_jsonable(value) for value in item]
    return item


def _tupled(item: Any) -> Any:
    """Lists of a JSON value as tuples; the outermost dict stays one."""
    if isinstance(item, list):
        return tuple(_tupled(value) for value in item)
    if isinstance(item, dict):
        return {name: _tupled(value) for name, value in item.items()}
    return item


def _view_from_json(item: dict[str, Any] | None) -> ParamView | None:
    return None if item is None else ParamView(**_tupled(item))


def _param_from_json(item: dict[str, Any]) -> ParamSpec:
    fields = _tupled(item)
    path = tuple(PathKey(**step) for step in item["path"])
    return ParamSpec(**(fields | {"path": path}))


def _node_from_json(item: dict[str, Any]) -> NodeGroup:
    return NodeGroup(**(_tupled(item) | {"bias": _view_from_json(item["bias"])}))


def _edge_from_json(item: dict[str, Any]) -> EdgeGroup:
    return EdgeGroup(**(_tupled(item) | {"view": _view_from_json(item["view"])}))


# -- the table -----------------------------------------------------------------------------------------------------


def _table(spec: NeuralGraphSpec) -> str:
    def view_text(view: ParamView | None) -> str:
        if view is None:
            return "-"
        param = spec.params[view.param]
        text = f"{format_path(param.path)} {list(param.shape)}"
        if view.sizes != param.shape:
            text += " at " + ", ".join(
                f"{start}:{start + size}" for start, size in zip(view.starts, view.sizes, strict=True)
            )
        return text

    def kind(group: EdgeGroup) -> str:
        blocks, n_in, n_out = spec.edge_block_shape(group)
        name = "dense" if blocks == 1 else "diagonal" if n_in == n_out == 1 else f"{blocks} groups"
        kernel = " " + "x".join(map(str, group.kernel_shape)) if group.kernel_shape else ""
        return name + kernel + (" (mirror)" if group.mirror else "")

    scalars = sum(math.prod(p.shape) for p in spec.params if p.is_floating)
    lines = [
        f"neural graph: {spec.num_nodes:,} nodes, {spec.num_edges:,} edges, {scalars:,} parameters"
        + (f", {spec.num_loose:,} of them loose" if spec.num_loose else "")
    ]
    lines += _columns(
        ("node group", "size", "role", "level", "activation", "bias"),
        [(g.name, str(g.size), g.role, str(g.level), g.activation, view_text(g.bias)) for g in spec.node_groups],
    )
    lines += _columns(
        ("edge group", "from", "to", "kind", "weights"),
        [
            (
                g.name,
                g.source,
                g.target,
                kind(g),
                view_text(g.view) if g.view is not None else f"constant {g.constant:g}",
            )
            for g in spec.edge_groups
        ],
    )
    free = [a for a in spec.actions if a.kind == "permutation"]
    lines += _columns(
        ("free permutation", "size", "one per"),
        [(a.id, str(a.size), " x ".join(a.per) or "-") for a in free],
    )
    lines += _columns(
        ("pinned", "by", "axes"),
        [(p.id, p.reason, ", ".join(f"{path}[{axis}]" for path, axis in p.axes)) for p in spec.pinned],
    )
    return "\n".join(lines)


def _columns(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "",
        *("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)),
    ]
    return [lines[0], lines[1], "-" * len(lines[1]), *lines[2:]]
