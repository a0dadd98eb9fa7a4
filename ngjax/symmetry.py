"""Permutations of neurons acting on weights: draw and apply."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ngjax.graph import to_groups
from ngjax.spec import AxisAction, NeuralGraphSpec, ParamSpec

Permutations = dict[str, Int[Array, "..."]]


def random_permutations(key: Array, spec: NeuralGraphSpec) -> Permutations:
    """One random permutation for every free id of the spec, consistent with one another.

    Args:
      key: a JAX random key.
      spec: of the architecture.

    Returns:
      For every id that stands in `spec.symmetry` (and every independent permutation these are built from) the index
      array of the full length of its axis: `new[i] = old[perm[i]]`. Where a permutation depends on the place along other
      axes, these stand in front: `[heads, inner]`.
    """
    independent = [action for action in spec.actions if action.kind == "permutation"]
    keys = jax.random.split(key, max(len(independent), 1))
    perms: Permutations = {}
    for action, subkey in zip(independent, keys, strict=False):
        lead = tuple(spec.action[id].size for id in action.per)
        places = jnp.broadcast_to(jnp.arange(action.size, dtype=jnp.int32), (*lead, action.size))
        perms[action.id] = jax.random.permutation(subkey, places, axis=-1, independent=True)
    used = {id for param in spec.params for id in param.axes if spec.is_free(id)}
    for id in sorted(used - perms.keys()):
        perms[id] = _index_array(spec, spec.action[id], perms)[1]
    return perms


def permute_params(spec: NeuralGraphSpec, perms: Permutations, params: Any) -> Any:
    """The parameters of the same network with its neurons in another order: `new[i] = old[perm[i]]` along each axis.

    Args:
      spec: of the architecture.
      perms: index arrays by id, as `random_permutations` draws them; an id left out stays in place.
      params: the parameter pytree; leaves may have leading batch axes and a trailing feature axis.

    Raises:
      ValueError: the leaves are not those of the spec; an unknown id or an index array of the wrong shape.
    """
    for id, perm in perms.items():
        if id not in spec.action:
            raise ValueError(f"unknown id {id!r}; the spec has {', '.join(sorted(spec.action))}")
        if perm.shape[-1] != spec.action[id].size:
            raise ValueError(
                f"permutation {id!r}: expected {spec.action[id].size} indices, received shape {perm.shape}"
            )
    num_lead = jax.eval_shape(functools.partial(to_groups, spec), params).nodes.ndim - 2
    leaves = [
        _permute_leaf(spec, perms, param, leaf, num_lead) if param.is_floating else leaf
        for param, leaf in zip(spec.params, spec.flatten(params), strict=True)
    ]
    return spec.unflatten(leaves, like=params)


def _permute_leaf(spec: NeuralGraphSpec, perms: Permutations, param: ParamSpec, leaf: Any, num_lead: int) -> Array:
    """Gathers along every axis; an axis whose permutation depends on other axes is gathered along with their places."""
    leaf = jnp.asarray(leaf)
    # Index arrays of dependent axes are written for the new places of the axes they depend on (as products have it),
    # so the independent axes move first.
    pending = []
    for axis, id in enumerate(param.axes):
        if not spec.is_free(id):
            continue
        per, index = _index_array(spec, spec.action[id], perms)
        if per:
            pending.append((axis, per, index))
        else:
            leaf = jnp.take(leaf, index, axis=num_lead + axis)
    for axis, per, index in pending:
        leaf = _take_dependent(spec, param, leaf, num_lead, axis, per, index)
    return leaf


def _take_dependent(
    spec: NeuralGraphSpec,
    param: ParamSpec,
    leaf: Array,
    num_lead: int,
    axis: int,
    per: tuple[str, ...],
    index: Array,
) -> Array:
    rank = len(param.shape)
    places = []
    for id in per:
        where = [(j, _places(spec, spec.action[other], id)) for j, other in enumerate(param.axes) if j != axis]
        found = [(j, place) for j, place in where if place is not None]
        if len(found) != 1:
            raise ValueError(
                f"axis {axis} of {'/'.join(str(step.key) for step in param.path)} depends on {id!r}, which is found on "
                f"{len(found)} of its other axes"
            )
        j, place = found[0]
        places.append(place.reshape([-1 if k == j else 1 for k in range(rank)]))
    own = np.arange(param.shape[axis]).reshape([-1 if k == axis else 1 for k in range(rank)])
    gather = index[(*places, own)]
    gather = gather.reshape((1,) * num_lead + gather.shape + (1,) * (leaf.ndim - num_lead - rank))
    return jnp.take_along_axis(leaf, gather, axis=num_lead + axis)


def _places(spec: NeuralGraphSpec, action: AxisAction, id: str) -> np.ndarray | None:
    """For each position along an axis with this action, the place along `id` it stands at; None if `id` is not in it."""
    if action.id == id:
        return np.arange(action.size)
    if action.kind == "product":
        sizes = [spec.action[part].size for part in action.parts]
        coordinates = np.unravel_index(np.arange(action.size), sizes)
        for part, coordinate in zip(action.parts, coordinates, strict=True):
            inner = _places(spec, spec.action[part], id)
            if inner is not None:
                return inner[coordinate]
    if action.kind == "concat":
        inner_places = [_places(spec, spec.action[part], id) for part in action.parts]
        if all(place is not None for place in inner_places):
            return np.concatenate(inner_places)
    return None


def _index_array(spec: NeuralGraphSpec, action: AxisAction, perms: Permutations) -> tuple[tuple[str, ...], Array]:
    """Ids the permutation depends on, and its index array `[*places along these ids, size]`."""
    if action.kind == "fixed":
        return (), jnp.arange(action.size, dtype=jnp.int32)
    if action.kind == "permutation":
        lead = tuple(spec.action[id].size for id in action.per)
        identity = jnp.broadcast_to(jnp.arange(action.size, dtype=jnp.int32), (*lead, action.size))
        return action.per, perms.get(action.id, identity)
    parts = [spec.action[part] for part in action.parts]
    arrays = [_index_array(spec, part, perms) for part in parts]
    bound = set(action.parts) if action.kind == "product" else set()
    free = tuple(dict.fromkeys(id for per, _ in arrays for id in per if id not in bound))
    lead = tuple(spec.action[id].size for id in free)
    if action.kind == "concat":
        columns, start = [], 0
        for part, (per, array) in zip(parts, arrays, strict=True):
            columns.append(start + jnp.broadcast_to(_align(array, per, free), (*lead, part.size)))
            start += part.size
        return free, jnp.concatenate(columns, axis=-1)
    # A product: coordinates (p_0, ..., p_k) of the new place give the old place, one part after the other.
    names = (*free, *action.parts)
    shape = (*lead, *(part.size for part in parts))
    old = jnp.zeros(shape, jnp.int32)
    for part, (per, array) in zip(parts, arrays, strict=True):
        old = old * part.size + jnp.broadcast_to(_align(array, (*per, part.id), names), shape)
    return free, old.reshape(*lead, action.size)


def _align(array: Array, own: tuple[str, ...], names: tuple[str, ...]) -> Array:
    """Axes of `array`, called `own`, put in the order of `names` with length one where it has none.

    An `own` one shorter than the array's rank leaves its last axis in place.
    """
    order = [own.index(name) for name in names if name in own]
    tail = list(range(len(own), array.ndim))
    array = array.transpose(*order, *tail)
    shape = iter(array.shape)
    aligned = [next(shape) if name in own else 1 for name in names]
    return array.reshape(*aligned, *shape)
