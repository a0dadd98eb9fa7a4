"""Meta-parameters of a rule: fresh ones, and checks of given ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ngjax.chains import mlp_spec
from ngjax.optimizers.graph_rules import GraphRule
from ngjax.optimizers.named_rules import Rule, find_rule
from ngjax.optimizers.parts import list_spec
from ngjax.optimizers.rules import CoordinatewiseLSTMRule
from ngjax.spec import flatten_with_path, format_path, path_keys


def init_meta_params(key: Array, rule: str | Rule = "ng-gnn", step: str = "normalized") -> dict[str, Any]:
    """Fresh meta-parameters of a rule, in float32.

    The last layer is zero: with `step="normalized"` the rule adds nothing yet to momentum, which the step starts from,
    and with `step="paper"` it does not move.

    Args:
      key: a JAX random key.
      rule: as for `ng_learned_opt`.
      step: as for `ng_learned_opt`; a name stands for a rule of another size with each.

    Raises:
      ValueError: an unknown rule or step.
    """
    return _init_meta_params(key, find_rule(rule, step))


# Compiled as one program: one operation after the other takes several times as long.
@functools.partial(jax.jit, static_argnums=1)
def _init_meta_params(key: Array, rule: Rule) -> dict[str, Any]:
    if isinstance(rule, GraphRule):
        # Any network declares the same meta-parameters.
        spec = mlp_spec((1, 1, 1))
        paths, shapes = zip(*((param.path, param.shape) for param in spec.params), strict=True)
        features = tuple(jnp.zeros((*shape, rule.reads.size), jnp.float32) for shape in shapes)
        return rule.init(key, features, list_spec(spec, paths, shapes))["params"]
    features = (jnp.zeros((1, rule.reads.size), jnp.float32),)
    if isinstance(rule, CoordinatewiseLSTMRule):
        return rule.init(key, features, (jnp.zeros((1, 2 * rule.width), jnp.float32),))["params"]
    return rule.init(key, features)["params"]


def checked_meta_params(rule: Rule, meta_params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Meta-parameters of the shapes that the rule declares, in float32."""
    name = type(rule).__name__
    if meta_params is None:
        raise ValueError(
            f"a {name} needs meta_params=, see init_meta_params: the weights that are shipped go by the name of their "
            "rule, as 'ng-gnn'"
        )
    expected = jax.eval_shape(functools.partial(_init_meta_params, rule=rule), jax.random.key(0))
    wanted, treedef = flatten_with_path(expected)
    received = {path_keys(path): leaf for path, leaf in flatten_with_path(meta_params)[0]}
    leaves = []
    for path, like in wanted:
        where = f"meta-parameter {format_path(path)} of {name}"
        if path_keys(path) not in received:
            raise ValueError(
                f"{where}: expected shape {like.shape}, received none; there are {_names(received) or 'none at all'}"
            )
        leaf = jnp.asarray(received.pop(path_keys(path)))
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{where}: expected a real floating array, received {leaf.dtype}")
        if leaf.shape != like.shape:
            raise ValueError(f"{where}: expected shape {like.shape}, received {leaf.shape}")
        leaves.append(leaf.astype(like.dtype))
    if received:
        raise ValueError(f"{name} has no meta-parameters {_names(received)}")
    return jax.tree.unflatten(treedef, leaves)


def _names(paths: Mapping[tuple[Any, ...], Any]) -> str:
    return ", ".join("/".join(map(str, path)) for path in paths)
