"""Networks from the modules of each framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

from .base import Network


def tokens(batch: int, length: int, vocabulary: int) -> jax.Array:
    """Inputs of language models."""
    return 3 * jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length) % vocabulary


def plain(apply: Callable[..., Any], shapes: Any, *inputs: Any) -> Network:
    """A function of parameters that are given by a tree of their shapes."""
    return Network(apply, lambda key: random_params(key, shapes), inputs)


def random_params(key: jax.Array, shapes: Any) -> Any:
    """Leaves for a tree of shapes: ones where the leaf is called "scale", otherwise small random numbers."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(key, len(pairs))
    leaves = [
        jnp.ones(shape) if getattr(path[-1], "key", None) == "scale" else 0.02 * jax.random.normal(key, shape)
        for key, (path, shape) in zip(keys, pairs, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def haiku(function: Callable[..., Any], *inputs: Any) -> Network:
    """A function that calls Haiku modules without state."""
    model: Any = hk.without_apply_rng(hk.transform(function))
    return Network(model.apply, lambda key: model.init(key, *inputs), inputs)


def flax_nnx(build: Callable[[nnx.Rngs], nnx.Module], *inputs: Any) -> Network:
    """An NNX module, its parameters as a pytree of dicts."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return Network(
        lambda params, *inputs: nnx.merge(graph, params)(*inputs),
        lambda key: nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)))),
        inputs,
    )


def equinox(build: Callable[[jax.Array], Any], *inputs: Any) -> Network:
    """An Equinox module for single examples, its parameters the module's arrays."""
    _, static = eqx.partition(eqx.filter_eval_shape(build, jax.random.key(0)), lambda leaf: hasattr(leaf, "shape"))
    return Network(
        lambda params, *inputs: jax.vmap(eqx.combine(params, static))(*inputs),
        lambda key: eqx.filter(build(key), eqx.is_array),
        inputs,
    )
