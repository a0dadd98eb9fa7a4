"""Static description of a network's weights as a graph: what is a node, what is an edge, what may be permuted.

A `NeuralGraphSpec` says, for one architecture, where every scalar of a parameter pytree lives in the neural graph (a
node slot, an edge slot or the list of loose scalars) and how each axis of each parameter moves when hidden neurons are
shuffled. It holds no arrays, is hashable and equal by value, so it can be a static argument of `jax.jit`.

Two small languages make this up:

* A `ParamView` reads a block of one parameter as `[blocks, source, target, kernel]`. Dense layers have one block;
  diagonal connections (normalization scales, residuals, depthwise kernels) have as many blocks as neurons and one
  source and one target in each; grouped layers are in between.
* An `AxisAction` (`ngjax.actions`) says how one axis of a parameter, or the neurons of a node group, move.

The two have to agree: permuting the weights must be the same as permuting the nodes of the graph, because this is what
makes a graph network that reads the graph equivariant. The constructor checks it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngjax.actions import (
    AxisAction,
    check_actions,
    check_neighbours,
    dependencies,
    is_free,
    letters,
    neighbours,
    old_places,
    orbits,
)

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
        return _is_dtype(self.dtype, jnp.floating)


def _is_dtype(dtype: str, kind: Any) -> bool:
    # The dtypes of random keys have names, but not such that numpy knows.
    return not dtype.startswith("key<") and bool(jnp.issubdtype(dtype, kind))


class ParamView(NamedTuple):
    """A block of parameter number `param`, read as `[blocks, source, target, kernel]`.

    Attributes:
      param: number of the parameter in the spec.
      starts, sizes: first place along each axis, and how many places of it are in the block.
      splits: factors of each axis; their product is its size.
      block, source, target, kernel: the factors, numbered through all axes, that make up each of the four axes of the
        view, in order. Factors named nowhere have size one.
      strides: for each axis the distance between neighbours along each factor, where the places are not one after the
        other in row-major order (query, key and value interleaved in each head); `()` where they are on all axes.
    """

    param: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    splits: tuple[tuple[int, ...], ...]
    block: tuple[int, ...] = ()
    source: tuple[int, ...] = ()
    target: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    strides: tuple[tuple[int, ...], ...] = ()

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

    def is_slice(self, axis: int) -> bool:
        """Whether the view's places along an axis of the parameter follow one another."""
        if not self.strides:
            return True
        split = self.splits[axis]
        row_major = [math.prod(split[i + 1 :]) for i in range(len(split))]
        return all(n == 1 or a == b for n, a, b in zip(split, self.strides[axis], row_major, strict=True))

    def places(self, axis: int) -> np.ndarray:
        """The view's places along an axis of the parameter, `[size]`, in row-major order of the axis' factors."""
        split = self.splits[axis]
        if self.is_slice(axis):
            return np.arange(self.starts[axis], self.starts[axis] + math.prod(split))
        coordinates = np.indices(split).reshape(len(split), -1)
        return self.starts[axis] + np.array(self.strides[axis]) @ coordinates


def param_view(
    param: int,
    shape: Sequence[int],
    *,
    block: Iterable[int] = (),
    source: Iterable[int] = (),
    target: Iterable[int] = (),
    kernel: Iterable[int] = (),
    starts: Mapping[int, int] | None = None,
    splits: Mapping[int, Sequence[int]] | None = None,
    strides: Mapping[int, Sequence[int]] | None = None,
) -> ParamView:
    """The view of a parameter that uses its axes whole and unsplit, except those named in the mappings.

    An axis with a `starts` and without `splits` is used from there to its end; factors are numbered after splitting.
    """
    starts, splits, strides = starts or {}, splits or {}, strides or {}
    factors = tuple(tuple(splits.get(axis, (n - starts.get(axis, 0),))) for axis, n in enumerate(shape))
    steps = tuple(
        tuple(strides.get(axis, [math.prod(split[i + 1 :]) for i in range(len(split))]))
        for axis, split in enumerate(factors)
    )
    return ParamView(
        param,
        starts=tuple(starts.get(axis, 0) for axis in range(len(factors))),
        sizes=tuple(math.prod(split) for split in factors),
        splits=factors,
        block=tuple(block),
        source=tuple(source),
        target=tuple(target),
        kernel=tuple(kernel),
        strides=steps if strides else (),
    )


class MoveError(ValueError):
    """A parameter, by its number in the spec, whose axes do not move as the neurons do that it belongs to."""

    def __init__(self, message: str, param: int) -> None:
        super().__init__(message)
        self.param = param


class NodeGroup(NamedTuple):
    """The neurons of one layer.

    Attributes:
      name: unique name.
      size: number of neurons.
      role: inputs and outputs keep their order, hidden neurons are exchangeable.
      level: depth in the network; inputs have level 0.
      axis: id of the action by which the neurons move.
      activation: one of `ACTIVATIONS`, applied to the neurons' values.
      slots: position embeddings the group uses: 1 (shared by the group), or one for each set of neurons that may change
        places with one another (`ngjax.actions.orbits`): for neurons that are pinned, each its own.
      bias: the parameter that gives the node feature, `None` for a feature of zero.
    """

    name: str
    size: int
    role: Role
    level: int
    axis: str
    activation: str = "none"
    slots: int = 1
    bias: ParamView | None = None


class NodeLayout(NamedTuple):
    """How the neurons of a group are read as `[blocks, neurons of a block]` where they do not lie block by block.

    The neurons are split into factors (row-major); those in `block`, in order, number the blocks, and the others, in
    order, the neurons of a block. Example: the values `[key heads, dim]` that queries share go one to one to the heads'
    outputs `[key heads, queries, dim]`, whose blocks are `(0, 2)`.
    """

    splits: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def rest(self) -> tuple[int, ...]:
        """The factors that number the neurons of a block."""
        return tuple(i for i in range(len(self.splits)) if i not in self.block)


class EdgeGroup(NamedTuple):
    """The weights of one parameter (or of a block of it), from the neurons of `source` to those of `target`.

    Attributes:
      name: unique name.
      source, target: names of node groups.
      blocks: 1 for dense (every pair), the group's size for diagonal (one to one), the number of groups for grouped;
        the neurons of one block are joined to one another.
      view: the parameter, or `None` for a connection without one (a residual), whose weight is `constant`.
      constant: the weight of every edge where there is no parameter.
      mirror: a later use of a parameter that already has its home; read into graphs, never written back.
      source_layout, target_layout: which neurons make up a block, where they do not follow one another.
    """

    name: str
    source: str
    target: str
    blocks: int = 1
    view: ParamView | None = None
    constant: float = 1.0
    mirror: bool = False
    source_layout: NodeLayout | None = None
    target_layout: NodeLayout | None = None

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return () if self.view is None else self.view.kernel_shape

    @property
    def kernel_size(self) -> int:
        return math.prod(self.kernel_shape)


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
      actions: how axes move; every id that `params`, node groups and later actions name.
      loose: scalars with no place in the graph (temperatures, tables), in the order of `params`. Nothing moves them.
      treedef: how to rebuild the pytree; left out of equality, and rebuilt from the paths when missing.
    """

    params: tuple[ParamSpec, ...]
    node_groups: tuple[NodeGroup, ...]
    edge_groups: tuple[EdgeGroup, ...]
    actions: tuple[AxisAction, ...]
    loose: tuple[ParamView, ...] = ()
    treedef: jax.tree_util.PyTreeDef | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_actions(self.actions)
        _check_params(self)
        _check_nodes(self)
        _check_edges(self)
        _check_homes(self)
        _check_moves(self)

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # What is cached stays behind: hashes of strings are others in another process.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

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

    def block_places(self, group: EdgeGroup, end: Literal["source", "target"]) -> np.ndarray:
        """Places of an edge group's source or target neurons in their node group, `[blocks, neurons of a block]`."""
        nodes = self.node_group[getattr(group, end)]
        layout: NodeLayout | None = getattr(group, f"{end}_layout")
        places: np.ndarray = np.arange(nodes.size, dtype=np.int32)
        if layout is not None:
            places = places.reshape(layout.splits).transpose(*layout.block, *layout.rest)
        return places.reshape(group.blocks, -1)

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
        return is_free(self.action, id)

    @functools.cached_property
    def symmetry(self) -> Any:
        """A pytree like the parameters whose leaves are `AxisIds`: one id per axis, `None` where it is pinned."""
        ids = [AxisIds(id if self.is_free(id) else None for id in param.axes) for param in self.params]
        return self.unflatten(ids)

    @functools.cached_property
    def pinned(self) -> tuple[PinnedAxes, ...]:
        """Ids that cannot move, with the axes that carry them and what pinned them.

        An axis that moves in part (a concatenation of free and pinned features) is listed with its pinned parts.
        """
        axes: dict[str, list[tuple[str, int]]] = {}
        for param in self.params:
            for axis, id in enumerate(param.axes):
                ids = [d for d in letters(self.action, id) if not self.is_free(d)] if self.is_free(id) else [id]
                for pinned in ids:
                    axes.setdefault(pinned, []).append((format_path(param.path), axis))
        reasons = {id: [self.action[letter].reason for letter in letters(self.action, id)] for id in axes}
        return tuple(
            PinnedAxes(id, ", ".join(dict.fromkeys(filter(None, reasons[id]))), tuple(where))
            for id, where in axes.items()
        )

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
                    f"parameter {format_path(param.path)} {param.shape} of the spec is missing: these parameters are "
                    f"of another architecture; they have {_summary(leaves)}"
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
          ValueError: the tree holds containers other than dicts, lists and tuples, and neither a treedef nor `like`
            says how to build them.
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
    for i, key in enumerate(keys):
        if isinstance(key, jax.tree_util.DictKey):
            path.append(PathKey("dict", key.key))
        elif isinstance(key, jax.tree_util.SequenceKey):
            path.append(PathKey("tuple" if type(node) is tuple else "list", key.idx))
        else:
            path.append(PathKey("attr", getattr(key, "name", getattr(key, "key", str(key)))))
        if i < len(keys) - 1:  # the leaf itself is not looked at: NNX warns where one does
            node = _child(node, path[-1])
    return tuple(path)


def _child(node: Any, step: PathKey) -> Any:
    try:
        return getattr(node, step.key) if step.kind == "attr" else node[step.key]
    except (AttributeError, TypeError, KeyError, IndexError):
        return None


def path_keys(path: Path) -> tuple[Any, ...]:
    """The keys alone: a FrozenDict and a dict, a list and a tuple are the same place."""
    return tuple(step.key for step in path)


def without_value(path: Path) -> Path:
    """The path of a variable without the attribute of its array, which NNX shows at times and hides at others."""
    is_value = len(path) > 1 and path[-1].kind == "attr" and path[-1].key == "value"
    return path[:-1] if is_value else path


def repeated_params(params: Sequence[ParamSpec], outputs: Sequence[tuple[Path, tuple[int, ...]]]) -> list[int | None]:
    """For each output of a function the number of the parameter that it is again: new running statistics, an update.

    It has the output's shape, and its path is the output's or the last part of it (behind the place in a tuple). Places
    in lists and tuples are no names: there, all parameters have to be outputs again.
    """
    numbers = {path_keys(param.path): i for i, param in enumerate(params)}
    shapes = {path_keys(path): tuple(shape) for path, shape in outputs}

    def all_again(prefix: tuple[Any, ...]) -> bool:
        return all(shapes.get((*prefix, *path_keys(param.path))) == param.shape for param in params)

    def number(path: Path, shape: tuple[int, ...]) -> int | None:
        keys = path_keys(path)
        for start in range(len(keys)):
            found = numbers.get(keys[start:])
            if found is not None and params[found].shape == tuple(shape):
                named = not all(isinstance(key, int) for key in keys[start:])
                return found if named or all_again(keys[:start]) else None
        return None

    return [number(path, shape) for path, shape in outputs]


def _summary(plain_paths: Iterable[tuple[Any, ...]]) -> str:
    return _shortened(["/".join(map(str, plain)) for plain in plain_paths])


def _shortened(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown


def _nest(paths: Sequence[Path], leaves: Sequence[Any]) -> Any:
    if len(paths) == 1 and not paths[0]:
        return leaves[0]
    kinds = {path[0].kind for path in paths}
    if kinds == {"attr"} or len(kinds) > 1:
        raise ValueError(
            f"the tree holds an object with {paths[0][0].key!r} in it, which only its own class can rebuild: pass "
            "like= with a pytree of that class"
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
    if sorted(built) != list(range(len(built))):
        raise ValueError(
            f"the tree holds a {kind} with leaves at {sorted(built)} and something without leaves between them: pass "
            "like= with such a tree"
        )
    ordered = [built[key] for key in sorted(built)]
    return ordered if kind == "list" else tuple(ordered)


# -- checks --------------------------------------------------------------------------------------------------------


def _check_params(spec: NeuralGraphSpec) -> None:
    action = spec.action
    for param in spec.params:
        where = f"parameter {format_path(param.path)}"
        if _is_dtype(param.dtype, jnp.complexfloating):
            raise TypeError(
                f"{where} is {param.dtype}: complex weights have no place in a neural graph; split them into real and "
                "imaginary leaves"
            )
        if param.is_floating and len(param.axes) != len(param.shape):
            raise ValueError(f"{where}: {len(param.axes)} axis ids for shape {param.shape}")
        for axis, id in enumerate(param.axes):
            if id not in action or action[id].size != param.shape[axis]:
                received = f"an action of size {action[id].size}" if id in action else "no action"
                raise ValueError(
                    f"{where}, axis {axis}: expected an action of size {param.shape[axis]}, received {received} for id "
                    f"{id!r}"
                )
        try:
            check_neighbours(action, param.axes)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not any(param.is_floating for param in spec.params):
        raise ValueError("a neural graph needs at least one floating parameter")


def _check_nodes(spec: NeuralGraphSpec) -> None:
    if len(spec.node_group) != len(spec.node_groups):
        raise ValueError("two node groups share one name")
    roles = [ROLES.index(group.role) for group in spec.node_groups]
    if roles != sorted(roles):
        raise ValueError("node groups must be in the order inputs, hidden, outputs")
    levels = [group.level for group in spec.node_groups if group.role == "hidden"]
    if levels != sorted(levels) or any((group.level == 0) != (group.role == "input") for group in spec.node_groups):
        raise ValueError(
            "levels must be 0 for inputs, positive for others and not decrease from one hidden group to the next"
        )
    for group in spec.node_groups:
        where = f"node group {group.name!r}"
        try:
            check_activation(group.activation)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if group.axis not in spec.action or spec.action[group.axis].size != group.size:
            raise ValueError(f"{where}: expected the id of an action of size {group.size}, received {group.axis!r}")
        needed = dependencies(spec.action, group.axis)
        if needed:
            raise ValueError(f"{where}: its action {group.axis!r} depends on {needed[0]}, which is not part of it")
        if group.role != "hidden" and spec.is_free(group.axis):
            raise ValueError(f"{where}: {group.role} neurons keep their order, but the action {group.axis!r} is free")
        num_orbits = int(orbits(spec.action, group.axis).max()) + 1
        if group.slots not in (1, num_orbits):
            raise ValueError(
                f"{where}: neurons that may change places share a position slot; expected slots of 1 or {num_orbits}, "
                f"received {group.slots}"
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
        for name, layout in ((group.source, group.source_layout), (group.target, group.target_layout)):
            _check_layout(spec, group, spec.node_group[name], layout)
        if group.view is not None:
            expected = (*spec.edge_block_shape(group), group.kernel_size)
            _check_view(spec, group.view, f"edge group {group.name!r}", expected)
        pad_kernel_shape(group.kernel_shape)


def _check_layout(spec: NeuralGraphSpec, group: EdgeGroup, nodes: NodeGroup, layout: NodeLayout | None) -> None:
    if layout is None:
        return
    numbered = len(set(layout.block)) == len(layout.block) and set(layout.block) <= set(range(len(layout.splits)))
    blocks = math.prod(layout.splits[i] for i in layout.block) if numbered else 0
    if math.prod(layout.splits) != nodes.size or blocks != group.blocks:
        raise ValueError(
            f"edge group {group.name!r}: {layout} does not make {group.blocks} blocks of the {nodes.size} neurons of "
            f"{nodes.name!r}"
        )


def _check_view(spec: NeuralGraphSpec, view: ParamView, where: str, expected: tuple[int, int, int, int]) -> None:
    if not 0 <= view.param < len(spec.params):
        raise ValueError(f"{where}: there is no parameter number {view.param}")
    param = spec.params[view.param]
    name = format_path(param.path)
    if not param.is_floating:
        raise ValueError(f"{where}: parameter {name} is {param.dtype}, only floating leaves have a home")
    if not len(view.starts) == len(view.sizes) == len(view.splits) == len(param.shape):
        raise ValueError(f"{where}: the view of {name} does not have one entry per axis of {param.shape}")
    if view.strides and (
        [len(steps) for steps in view.strides] != [len(split) for split in view.splits]
        or min(itertools.chain(*view.strides), default=1) < 1
    ):
        raise ValueError(f"{where}: the view of {name} does not have one positive stride per factor")
    for axis, length in enumerate(param.shape):
        fits = min(view.splits[axis], default=1) > 0 and math.prod(view.splits[axis]) == view.sizes[axis]
        places = view.places(axis) if fits else np.zeros(0)
        if not fits or places.min() < 0 or places.max() >= length or len(np.unique(places)) != len(places):
            raise ValueError(
                f"{where}: block {view.starts} + {view.sizes} split as {view.splits} does not fit {name} {param.shape}"
            )
    used = [*view.block, *view.source, *view.target, *view.kernel]
    factors = view.factors
    if len(set(used)) != len(used) or not set(used) <= set(range(len(factors))):
        raise ValueError(f"{where}: {name} has {len(factors)} factors, of which each may be used once; received {used}")
    if any(n != 1 for i, n in enumerate(factors) if i not in used):
        raise ValueError(f"{where}: every factor of {name} longer than one must be used")
    if view.shape != expected:
        raise ValueError(
            f"{where}: expected [blocks, source, target, kernel] = {expected}, but {name} gives {view.shape}"
        )


def _check_homes(spec: NeuralGraphSpec) -> None:
    if [view.param for view in spec.loose] != sorted(view.param for view in spec.loose):
        raise ValueError("loose scalars must be in the order of the parameters")
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
    """Whether two views of the same parameter share a scalar: whether they do along every axis."""
    for axis in range(len(a.sizes)):
        ours, theirs = a.places(axis), b.places(axis)
        if max(ours[0], theirs[0]) > min(ours[-1], theirs[-1]) or not np.isin(ours, theirs).any():
            return False
    return True


def _check_moves(spec: NeuralGraphSpec) -> None:
    """Permuting the axes of the parameters must be the same as permuting nodes: tried on permutations that tell."""
    rng = np.random.default_rng(0)
    trials = _telling_permutations(spec)
    ids = dict.fromkeys([*(id for param in spec.params for id in param.axes), *(g.axis for g in spec.node_groups)])
    tables = {id: _moves(spec, trials, id) for id in ids if not dependencies(spec.action, id)}

    def check(view: ParamView, trial: np.ndarray, new: Places, old: Places, who: str) -> None:
        """Raises where what stands at new places of the view does not come from the old ones."""
        param = spec.params[view.param]
        new_entry, old_entry = _param_places(view, new), _param_places(view, old)
        for axis, id in enumerate(param.axes):
            if id in tables:
                moved = tables[id][trial, new_entry[axis]]
            else:
                around = neighbours(spec.action, param.axes, new_entry, axis)
                moved = old_places(spec.action, _at(trials, trial), id, new_entry[axis], around)
            if (moved != old_entry[axis]).any():
                raise MoveError(
                    f"parameter {format_path(param.path)} {param.shape}, axis {axis}: its action {id!r} does not move "
                    f"it as {who} move",
                    view.param,
                )

    for node_group in spec.node_groups:
        if node_group.bias is not None:
            trial, *new = _sample(rng, trials, node_group.bias.shape)
            old = (*new[:2], tables[node_group.axis][trial, new[2]], new[3])
            check(node_group.bias, trial, tuple(new), old, f"the neurons of {node_group.name!r}")
    for group in spec.edge_groups:
        trial, b, i, o, k = _sample(rng, trials, (*spec.edge_block_shape(group), group.kernel_size))
        source, target = (spec.block_places(group, end) for end in ("source", "target"))
        b_source, old_i = _find(source, tables[spec.node_group[group.source].axis][trial, source[b, i]])
        b_target, old_o = _find(target, tables[spec.node_group[group.target].axis][trial, target[b, o]])
        ends = f"the neurons of {group.source!r} and {group.target!r}"
        if (b_source != b_target).any():
            raise ValueError(f"edge group {group.name!r}: {ends} do not move so that its blocks stay together")
        if group.view is not None:
            check(group.view, trial, (b, i, o, k), (b_source, old_i, old_o, k), ends)
    for view in spec.loose:
        trial, *new = _sample(rng, trials, view.shape)
        check(view, trial, tuple(new), tuple(new), "loose scalars, which stay in place,")


Places = tuple[np.ndarray, ...]
Trials = dict[str, np.ndarray]


def _telling_permutations(spec: NeuralGraphSpec) -> Trials:
    """Index arrays `[trials, *places of per, size]` of a few permutations of everything at once.

    No two independent permutations always move alike in them, nor one never: number `j` of them (each place of `per`
    has its own) is rotated in those trials that the binary digits of `j + 1` name.
    """
    shapes = {
        action.id: (*(spec.action[id].size for id in action.per), action.size)
        for action in spec.actions
        if action.kind == "permutation"
    }
    count = sum(math.prod(shape[:-1]) for shape in shapes.values())
    digits = np.arange(max(count.bit_length(), 1))
    trials, start = {}, 1
    for id, (*lead, size) in shapes.items():
        number = np.arange(start, start + math.prod(lead)).reshape(*lead, 1)
        rotated = number >> digits.reshape(-1, *[1] * number.ndim) & 1
        trials[id] = ((np.arange(size) + rotated) % size).astype(np.int32)
        start += math.prod(lead)
    return trials


@dataclasses.dataclass(frozen=True)
class _Trial:
    """The index array of a permutation in one trial, or in as many as there are places."""

    array: np.ndarray
    trial: np.ndarray

    def __getitem__(self, places: Any) -> np.ndarray:
        return self.array[(self.trial, *places)]


def _at(trials: Trials, trial: np.ndarray) -> dict[str, _Trial]:
    return {id: _Trial(array, trial) for id, array in trials.items()}


def _moves(spec: NeuralGraphSpec, trials: Trials, id: str) -> np.ndarray:
    """Old places along an axis in each trial, `[trials, size]`."""
    number, size = _num_trials(trials), spec.action[id].size
    trial, places = np.indices((number, size), dtype=np.int32)
    return old_places(spec.action, _at(trials, trial), id, places, lambda other: None)


def _num_trials(trials: Trials) -> int:
    return len(next(iter(trials.values()), [None]))


def _sample(rng: np.random.Generator, trials: Trials, shape: tuple[int, ...], most: int = 1024) -> list[np.ndarray]:
    """Numbers of trials, and coordinates in an array: all combinations, or some."""
    shape = (_num_trials(trials), *shape)
    total = math.prod(shape)
    flat = np.arange(total) if total <= most else rng.integers(total, size=most)
    return [coordinate.astype(np.int32) for coordinate in np.unravel_index(flat, shape)]


def _find(table: np.ndarray, values: np.ndarray) -> Places:
    """Coordinates of `values` in a table that holds each number below its size once."""
    return np.unravel_index(np.argsort(table, axis=None)[values], table.shape)


def _param_places(view: ParamView, places: Places) -> list[np.ndarray]:
    """Places along each axis of the parameter for coordinates `[blocks, source, target, kernel]` of the view."""
    factors = view.factors
    coordinates = [np.zeros_like(places[0])] * len(factors)
    for roles, place in zip((view.block, view.source, view.target, view.kernel), places, strict=True):
        for i, coordinate in zip(
            roles, np.unravel_index(place, [factors[i] for i in roles]) if roles else (), strict=True
        ):
            coordinates[i] = coordinate
    rows = iter(coordinates)
    result = []
    for axis, split in enumerate(view.splits):
        mine = [next(rows) for _ in split]
        flat = np.ravel_multi_index(mine, split) if split else np.zeros_like(places[0])
        result.append(view.places(axis)[flat].astype(np.int32))
    return result


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
    layouts = {
        name: None if item[name] is None else NodeLayout(**_tupled(item[name]))
        for name in ("source_layout", "target_layout")
    }
    return EdgeGroup(**(_tupled(item) | layouts | {"view": _view_from_json(item["view"])}))


# -- the table -----------------------------------------------------------------------------------------------------


def _table(spec: NeuralGraphSpec) -> str:
    def view_text(view: ParamView | None) -> str:
        if view is None:
            return "-"
        param = spec.params[view.param]
        text = f"{format_path(param.path)} {list(param.shape)}"
        return text if view.sizes == param.shape else f"{text} at [{', '.join(_window_text(spec, view))}]"

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
        ("node group", "size", "role", "level", "moves as", "activation", "bias"),
        [
            (g.name, str(g.size), g.role, str(g.level), g.axis, g.activation, view_text(g.bias))
            for g in spec.node_groups
        ],
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
    lines += _columns(
        ("free permutation", "size", "one per"),
        [(a.id, str(a.size), " x ".join(a.per) or "-") for a in spec.actions if a.kind == "permutation"],
    )
    lines += _columns(
        ("built of these", "size", "how"),
        [(a.id, str(a.size), _word(a)) for a in spec.actions if a.parts],
    )
    lines += _columns(
        ("pinned", "by", "axes"),
        [(p.id, p.reason, _shortened([f"{path}[{axis}]" for path, axis in p.axes])) for p in spec.pinned],
    )
    return "\n".join(lines)


def _window_text(spec: NeuralGraphSpec, view: ParamView) -> Iterable[str]:
    """Which places along each axis, as one would index an array; `8 + 3x4 by 17, 1` for places with gaps."""
    for axis, length in enumerate(spec.params[view.param].shape):
        start, size = view.starts[axis], view.sizes[axis]
        if not view.is_slice(axis):
            split, steps = view.splits[axis], view.strides[axis]
            yield f"{start} + {'x'.join(map(str, split))} by {', '.join(map(str, steps))}"
        elif size == length:
            yield ":"
        else:
            yield str(start) if size == 1 else f"{start}:{start + size}"


def _word(action: AxisAction) -> str:
    """How an action is built, long lists shortened."""
    parts = action.parts if len(action.parts) <= 4 else (*action.parts[:3], "...", action.parts[-1])
    joined = {"product": " x ", "concat": " + ", "stack": ", "}[action.kind].join(parts)
    return f"{joined}, one for each of {action.per[0]}" if action.kind == "stack" else joined


def _columns(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "",
        *("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)),
    ]
    return [lines[0], lines[1], "-" * len(lines[1]), *lines[2:]]
