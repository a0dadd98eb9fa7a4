"""Learned optimizers as `optax` transformations."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ngjax.optimizers.features import MOMENTUM_DECAYS, NUM_FEATURES, scalar_features, update_momenta
from ngjax.optimizers.heads import paper_step
from ngjax.optimizers.order import natural_layer_order, spec_layer_order
from ngjax.optimizers.rules import RULES, Rule
from ngjax.spec import NeuralGraphSpec, Path, flatten_with_path, format_path, path_keys

LayerOrder = Callable[[Sequence[Path], Sequence[tuple[int, ...]]], Sequence[int]]
"""From paths and shapes of the leaves to the indices of the leaves in the order of the layers."""


class LearnedOptState(NamedTuple):
    """State of a learned optimizer.

    Attributes:
      count: steps taken, `int32`.
      momenta: one tree like the parameters, in float32, for each of `MOMENTUM_DECAYS`.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # the name that optax uses, which tuples have too
    momenta: tuple[PyTree, ...]


def ng_learned_opt(
    rule: str | Rule = "ff", *, spec: NeuralGraphSpec | None = None, meta_params: Mapping[str, Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """A learned optimizer (Kofinas et al. 2024, section 4.3): updates that a meta-trained network computes.

    `update(gradients, state, params)` returns what is to be added to the parameters. It computes in float32 and returns
    the dtypes of the parameters. Updates are finite where gradients, parameters and meta-parameters are, from 1e-30 to
    1e30; gradients that are not finite give updates that are not, for `optax.apply_if_finite` to notice. Leaves that
    are masked (`optax.MaskedNode`, `None`) are left out as in all of `optax`.

    Args:
      rule: `"ff"`, every scalar for itself, or `"lstm"`, which runs over the tensors of the network; or a rule of
        another size, as `FFRule(width=32)`.
      spec: of the architecture, which tells `"lstm"` the order of the layers; it may have more parameters than the
        tree. Without one, the order is that of the names, see `natural_layer_order`.
      meta_params: what `init_meta_params` returned, meta-trained. They may be traced, so that gradients with respect to
        them can be taken.

    Raises:
      ValueError: an unknown rule; no meta-parameters; those of another rule or size. `init`: a leaf that the spec does
        not have. `update`: no `params`; other leaves than those `init` saw.
      TypeError: meta-parameters, parameters or gradients that are not real floating arrays.
    """
    order = natural_layer_order if spec is None else functools.partial(spec_layer_order, spec)
    return ordered_learned_opt(_find_rule(rule), meta_params, order)


def ordered_learned_opt(
    rule: Rule, meta_params: Mapping[str, Any] | None, order: LayerOrder
) -> optax.GradientTransformationExtraArgs:
    """`ng_learned_opt` for layers in any order. Arguments and errors as there."""
    theta = _checked_meta_params(rule, meta_params)

    def init(params: PyTree) -> LearnedOptState:
        leaves = _leaves("parameter", params)
        order(leaves.paths, leaves.shapes)  # a spec that does not fit is refused here
        momenta = tuple(
            jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=jnp.float32), params) for _ in MOMENTUM_DECAYS
        )
        return LearnedOptState(jnp.zeros((), jnp.int32), momenta)

    def update(
        updates: PyTree, state: LearnedOptState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, LearnedOptState]:
        del extra_args
        if params is None:
            raise ValueError("argument params is missing: a learned optimizer needs update(gradients, state, params)")
        momenta = [_leaves("momentum", tree) for tree in state.momenta]
        gradients, values = _leaves("gradient", updates), _leaves("parameter", params)
        _check_same(momenta[0], gradients)
        _check_same(momenta[0], values)
        new_momenta = [
            update_momenta(old, gradient)
            for gradient, *old in zip(gradients.arrays, *(m.arrays for m in momenta), strict=True)
        ]
        features = [scalar_features(*leaf) for leaf in zip(values.arrays, gradients.arrays, new_momenta, strict=True)]
        steps = [paper_step(head) for head in _apply(rule, theta, features, order(values.paths, values.shapes))]
        new_updates = [step.astype(value.dtype) for step, value in zip(steps, values.arrays, strict=True)]
        new_state = LearnedOptState(
            optax.safe_increment(state.count),
            tuple(m.treedef.unflatten(column) for m, column in zip(momenta, _columns(new_momenta), strict=True)),
        )
        return gradients.treedef.unflatten(new_updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def init_meta_params(key: Array, rule: str | Rule = "ff") -> dict[str, Any]:
    """Fresh meta-parameters of a rule, in float32.

    Args:
      key: a JAX random key.
      rule: as for `ng_learned_opt`.

    Raises:
      ValueError: an unknown rule.
    """
    return _init_meta_params(key, _find_rule(rule))


# Compiled as one program: one operation after the other takes several times as long.
@functools.partial(jax.jit, static_argnums=1)
def _init_meta_params(key: Array, rule: Rule) -> dict[str, Any]:
    return rule.init(key, (jnp.zeros((1, NUM_FEATURES), jnp.float32),))["params"]


def _apply(
    rule: Rule, theta: Mapping[str, Any], features: Sequence[Float[Array, "..."]], order: Sequence[int]
) -> list[Float[Array, "..."]]:
    """Heads `[*shape, 2]` of features `[*shape, 14]` that are not in the order of the layers."""
    if not features:
        return []
    heads = rule.apply({"params": theta}, tuple(features[i] for i in order))
    by_leaf = dict(zip(order, heads, strict=True))
    return [by_leaf[i] for i in range(len(features))]


def _columns(rows: Sequence[Sequence[Array]]) -> list[list[Array]]:
    return [[row[k] for row in rows] for k in range(len(MOMENTUM_DECAYS))]


# -- checks ------------------------------------------------------------------------------------------------------------


class _Leaves(NamedTuple):
    what: str
    paths: list[Path]
    arrays: list[Array]
    treedef: jax.tree_util.PyTreeDef

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(array.shape) for array in self.arrays]

    def shape_by_path(self) -> dict[tuple[Any, ...], tuple[int, ...]]:
        return dict(zip(map(path_keys, self.paths), self.shapes, strict=True))


def _leaves(what: str, tree: PyTree) -> _Leaves:
    pairs, treedef = flatten_with_path(tree)
    for path, leaf in pairs:
        dtype = getattr(leaf, "dtype", None)
        if not hasattr(leaf, "shape") or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            received = type(leaf).__name__ if dtype is None else f"{dtype}{list(leaf.shape)}"
            raise TypeError(
                f"{what} {format_path(path)}: expected a real floating array, received {received}; "
                "optax.masked leaves it out"
            )
    return _Leaves(what, [path for path, _ in pairs], [jnp.asarray(leaf) for _, leaf in pairs], treedef)


def _check_same(expected: _Leaves, received: _Leaves) -> None:
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


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "no such leaf" if shape is None else f"shape {shape}"


def _find_rule(rule: str | Rule) -> Rule:
    if isinstance(rule, typing.get_args(Rule)):
        return rule
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known are {', '.join(RULES)}")
    return RULES[rule]


def _checked_meta_params(rule: Rule, meta_params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Meta-parameters of the shapes that the rule declares, in float32."""
    name = type(rule).__name__
    if meta_params is None:
        raise ValueError(f"no weights are shipped for the rule {name} yet: give meta_params=, see init_meta_params")
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
