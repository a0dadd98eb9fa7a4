"""Permutations of neurons acting on weights: draw and apply."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ngjax.actions import dependencies, index_array, letters, neighbours, old_places
from ngjax.graph import to_groups
from ngjax.spec import NeuralGraphSpec, ParamSpec

Permutations = Mapping[str, Int[Array | np.ndarray, "..."]]


@functools.partial(jax.jit, static_argnums=1)
def random_permutations(key: Array, spec: NeuralGraphSpec) -> dict[str, Int[Array, "..."]]:
    """One random permutation for every free id of the spec, consistent with one another.

    Args:
      key: a JAX random key.
      spec: of the architecture.

    Returns:
      For every independent permutation, and every id of `spec.symmetry` and of the node groups that is built from them,
      the index array of the full length of its axis: `new[i] = old[perm[i]]`. Where it depends on the place along other
      axes, these stand in front: `[heads, inner]`.
    """
    independent = [action for action in spec.actions if action.kind == "permutation"]
    leads = [tuple(spec.action[id].size for id in action.per) for action in independent]
    sizes = np.repeat([action.size for action in independent], [math.prod(lead) for lead in leads])
    # One sort draws all of them: a row each, of random numbers and then, for the shorter ones, of what sorts last.
    width = int(sizes.max(initial=0))
    bits = jax.random.bits(key, (len(sizes), width), jnp.uint32)
    bits = jnp.where(np.arange(width) < sizes[:, None], bits, jnp.uint32(2**32 - 1))
    order = jnp.argsort(bits, axis=-1, stable=True).astype(jnp.int32)
    perms: dict[str, Array] = {}
    start = 0
    for action, lead in zip(independent, leads, strict=True):
        stop = start + math.prod(lead)
        perms[action.id] = order[start:stop, : action.size].reshape(*lead, action.size)
        start = stop
    return perms | {id: jnp.asarray(index_array(spec.action, perms, id)) for id in _built_ids(spec)}


def permute_params(spec: NeuralGraphSpec, perms: Permutations, params: Any, *, feature_axis: bool | None = None) -> Any:
    """The parameters of the same network with its neurons in another order: `new[i] = old[perm[i]]` along each axis.

    Args:
      spec: of the architecture.
      perms: index arrays by id, as `random_permutations` draws them. Independent ones act; those of ids that are built
        from others follow from them. An independent id left out stays in place.
      params: the parameter pytree; leaves may have leading batch axes and a trailing feature axis.
      feature_axis: whether leaves end with a feature axis; `None` reads it off the shapes, as `to_graph` does.

    Raises:
      ValueError: the leaves are not those of the spec; an unknown or pinned id, an index array of the wrong shape, one
        of a built id without those that it is built from.
    """
    for id, perm in perms.items():
        _check_permutation(spec, perms, id, tuple(perm.shape))
    num_lead = len(_lead_shape(spec, params, feature_axis))
    return _on_floating(spec, params, lambda leaves: _permute_leaves(spec, _acting(spec, perms), leaves, num_lead))


def permute_randomly(key: Array, spec: NeuralGraphSpec, params: Any, *, feature_axis: bool | None = None) -> Any:
    """The same networks, the hidden neurons of each in a random order of its own: an augmentation for any architecture.

    Args:
      key: a JAX random key. One network is permuted by what `random_permutations` draws from it; with batch axes each
        gets its own of as many keys split off.
      spec: of the architecture.
      params: the parameter pytree; leaves may have leading batch axes and a trailing feature axis, which moves along.
      feature_axis: whether leaves end with a feature axis; `None` reads it off the shapes, as `to_graph` does.

    Raises:
      ValueError: the leaves are not those of the spec.
    """
    lead = _lead_shape(spec, params, feature_axis)

    def permute(key: Array, leaves: list[Any]) -> list[Any]:
        return _permute_leaves(spec, _acting(spec, random_permutations(key, spec)), leaves, 0)

    for _ in lead:
        permute = jax.vmap(permute)
    keys = jax.random.split(key, lead) if lead else key
    return _on_floating(spec, params, functools.partial(permute, keys))


def _lead_shape(spec: NeuralGraphSpec, params: Any, feature_axis: bool | None) -> tuple[int, ...]:
    """Lengths of the batch axes."""
    groups = jax.eval_shape(functools.partial(to_groups, spec, feature_axis=feature_axis), params)
    return tuple(groups.nodes.shape[:-2])


def _acting(spec: NeuralGraphSpec, perms: Permutations) -> dict[str, Any]:
    return {id: perm for id, perm in perms.items() if spec.action[id].kind == "permutation"}


def _on_floating(spec: NeuralGraphSpec, params: Any, change: Callable[[list[Any]], list[Any]]) -> Any:
    """The parameters with their floating leaves changed; `change` sees `None` for the others."""
    leaves = spec.flatten(params)
    changed = change([leaf if p.is_floating else None for p, leaf in zip(spec.params, leaves, strict=True)])
    return spec.unflatten(
        [b if p.is_floating else a for p, a, b in zip(spec.params, leaves, changed, strict=True)], like=params
    )


@functools.partial(jax.jit, static_argnums=(0, 3))
def _permute_leaves(
    spec: NeuralGraphSpec, perms: dict[str, Array], leaves: list[Array | None], num_lead: int
) -> list[Array | None]:
    return [
        None if leaf is None else _permute_leaf(spec, perms, param, leaf, num_lead)
        for param, leaf in zip(spec.params, leaves, strict=True)
    ]


def _built_ids(spec: NeuralGraphSpec) -> list[str]:
    """Free ids of axes and node groups that are built from others."""
    used = {id for param in spec.params for id in param.axes} | {group.axis for group in spec.node_groups}
    return [action.id for action in spec.actions if action.id in used and action.parts and spec.is_free(action.id)]


def _check_permutation(spec: NeuralGraphSpec, perms: Permutations, id: str, shape: tuple[int, ...]) -> None:
    if id not in spec.action:
        raise ValueError(f"unknown id {id!r}; the spec has {', '.join(sorted(spec.action))}")
    if not spec.is_free(id):
        raise ValueError(f"id {id!r} is pinned and cannot be permuted")
    missing = [letter for letter in letters(spec.action, id) if spec.is_free(letter) and letter not in perms]
    if missing:
        raise ValueError(f"id {id!r} moves as {', '.join(missing)} do: give the permutations of these")
    per = [spec.action[group[0]].size for group in dependencies(spec.action, id)]
    expected = (*per, spec.action[id].size)
    if shape != expected:
        raise ValueError(f"permutation {id!r}: expected an index array of shape {expected}, received {shape}")


def _permute_leaf(spec: NeuralGraphSpec, perms: Permutations, param: ParamSpec, leaf: Array, num_lead: int) -> Array:
    """Gathers along every axis; axes that depend on others are gathered together, by the new places along all axes."""
    rank = len(param.shape)
    dependent = {}
    grid = np.meshgrid(*(np.arange(n, dtype=np.int32) for n in param.shape), indexing="ij", sparse=True)
    for axis, id in enumerate(param.axes):
        if not any(letter in perms for letter in letters(spec.action, id)):
            continue
        if dependencies(spec.action, id):
            around = neighbours(spec.action, param.axes, grid, axis)
            dependent[axis] = old_places(spec.action, perms, id, grid[axis], around)
        else:
            index = old_places(spec.action, perms, id, np.arange(param.shape[axis], dtype=np.int32), _no_others)
            leaf = jnp.take(leaf, index, axis=num_lead + axis)
    if dependent:
        places = [dependent.get(axis, grid[axis]) for axis in range(rank)]
        leaf = leaf[(*[slice(None)] * num_lead, *places)]
    return leaf


def _no_others(other: str) -> Any:
    raise AssertionError(f"nothing depends on {other!r} here")
