"""The leaves of a tree with their paths, and what is said of trees that do not fit."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ngjax.spec import Path, flatten_with_path, format_path, path_keys, without_value


class Leaves(NamedTuple):
    """The leaves of a tree, as arrays, and what messages call them.

    Attributes:
      what: the tree is one of.
      paths: of the leaves; the `value` of an NNX variable is left out.
      arrays: the leaves.
      treedef: of the tree.
      left_out: paths of places where leaves are masked or `None`.
    """

    what: str
    paths: list[Path]
    arrays: list[Array]
    treedef: jax.tree_util.PyTreeDef
    left_out: list[Path]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(array.shape) for array in self.arrays]

    def shape_by_path(self) -> dict[tuple[Any, ...], tuple[int, ...]]:
        return dict(zip(map(path_keys, self.paths), self.shapes, strict=True))


def read_leaves(what: str, tree: PyTree) -> Leaves:
    """The leaves of a tree of `what` (gradients, parameters).

    Raises:
      TypeError: a leaf that is no real floating array.
    """
    pairs, treedef = flatten_with_path(tree)
    for path, leaf in pairs:
        dtype = getattr(leaf, "dtype", None)
        if not hasattr(leaf, "shape") or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            received = type(leaf).__name__ if dtype is None else f"{dtype}{list(leaf.shape)}"
            raise TypeError(
                f"{what} {format_path(path)}: expected a real floating array, received {received}; "
                "optax.masked leaves it out"
            )
    paths = [without_value(path) for path, _ in pairs]
    return Leaves(what, paths, [jnp.asarray(leaf) for _, leaf in pairs], treedef, _left_out(tree))


def _left_out(tree: PyTree) -> list[Path]:
    def is_left_out(node: Any) -> bool:
        return node is None or isinstance(node, optax.MaskedNode)

    shown = jax.tree.map(is_left_out, tree, is_leaf=is_left_out)
    return [without_value(path) for path, left_out in flatten_with_path(shown)[0] if left_out]


def check_same(expected: Leaves, received: Leaves) -> None:
    """Raises where leaves are not at the places and of the shapes that `init` saw."""
    wanted, came = expected.shape_by_path(), received.shape_by_path()
    for path in [*wanted, *came]:
        if wanted.get(path) != came.get(path):
            raise ValueError(
                f"{received.what} {'/'.join(map(str, path)) or '<root>'}: expected {_shape_text(wanted.get(path))}, "
                f"as init saw it, received {_shape_text(came.get(path))}"
            )
    if list(wanted) != list(came):
        raise ValueError(
            f"{received.what}s: expected the containers that init saw, {expected.treedef}, received {received.treedef}"
        )


def read_mask(what: str, mask: PyTree | Callable[[PyTree], PyTree], params: PyTree) -> list[bool]:
    """The boolean for each leaf of the parameters, of a mask as `optax` takes it.

    Args:
      what: the mask is one of, for messages.
      mask: booleans in the structure of the parameters or of a prefix of it, or a function that returns them.
      params: may have leaves that are masked or `None`, which have no boolean.

    Raises:
      ValueError: another structure.
      TypeError: leaves that are no booleans; one boolean for a tree of parameters.
    """
    if isinstance(mask, (bool, np.bool_)) and not jax.tree_util.all_leaves([params]):
        # What is left of a function that was called as one of a number.
        raise TypeError(
            f"{what}: expected a tree of booleans, or a function that returns one, and not a single {mask}; "
            f"optax.inject_hyperparams takes functions for schedules unless static_args names {what}"
        )
    functions = jax.tree.leaves(mask)
    # A module that can be called may be a tree of booleans all the same.
    if functions and all(map(callable, functions)):
        mask = typing.cast(Callable[[PyTree], PyTree], mask)(params)
    try:
        found = jax.tree.leaves(jax.tree.broadcast(mask, params))
    except ValueError as error:
        raise ValueError(f"{what}: expected booleans in the structure of the parameters; {error}") from None
    for flag in found:
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"{what}: expected booleans, True where it applies; received {flag!r}")
    return [bool(flag) for flag in found]


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "no such leaf" if shape is None else f"shape {shape}"
