"""Learned optimizers as `optax` transformations."""

from __future__ import annotations

import functools
import operator
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ngjax.nn import NGT
from ngjax.optimizers.features import MOMENTUM_DECAYS, update_momenta
from ngjax.optimizers.graph_rules import GraphRule
from ngjax.optimizers.leaves import Leaves, check_same, read_leaves, read_mask
from ngjax.optimizers.meta_file import MetaFile, check_made_for
from ngjax.optimizers.meta_params import checked_meta_params
from ngjax.optimizers.named_rules import Rule, computing, find_rule
from ngjax.optimizers.order import natural_layer_order, spec_layer_order
from ngjax.optimizers.parts import inferred_spec, list_spec
from ngjax.optimizers.rules import CoordinatewiseLSTMRule
from ngjax.optimizers.shipped import shipped_meta_params
from ngjax.optimizers.steps import normalized_step, paper_step
from ngjax.spec import NeuralGraphSpec


class Layout(NamedTuple):
    """How a rule takes the leaves: their indices in the order it wants, and the spec of the list in this order."""

    order: Sequence[int]
    spec: NeuralGraphSpec | None = None


LayoutOf = Callable[[Leaves], Layout]
"""From the parameters to their layout."""


class LearnedOptState(NamedTuple):
    """State of a learned optimizer.

    Attributes:
      count: steps taken, `int32`.
      momenta: one tree like the parameters, in float32, for each of `MOMENTUM_DECAYS`.
      carry: of `"coordinatewise-lstm"`, a tree like the parameters with leaves `[*shape, 2 * width]` in float32, hidden
        states and then memories, zero at first; of other rules `None`. Functions for `optax.tree.map_params` that
        bring parameters and state together meet its axis too.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # the name that optax uses, which tuples have too
    momenta: tuple[PyTree, ...]
    carry: PyTree = None


def ng_learned_opt(
    rule: str | Rule = "ng-gnn",
    *,
    spec: NeuralGraphSpec | None = None,
    meta_params: Mapping[str, Any] | MetaFile | None = None,
    step: str = "normalized",
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: float | Array = 0.0,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    clip: float | Array | None = None,
    dtype: Any = "float32",
    chunk: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A learned optimizer (Kofinas et al. 2024, section 4.3): updates that a meta-trained network computes.

    `update(gradients, state, params)` returns what is to be added to the parameters. State is float32; updates are
    computed in float32 and have the dtypes of the parameters. Updates are finite where gradients, parameters and
    meta-parameters are, from 1e-30 to 1e30; gradients that are not finite give updates that are not, for
    `optax.apply_if_finite` to notice: a rule that reads a graph carries them through all of it, and the state keeps
    them. Leaves that are masked (`optax.MaskedNode`, `None`) are left out as in all of `optax`.
    (`optax.inject_hyperparams` needs `static_args=("rule", "chunk", "weight_decay_mask")` where these are given: it
    takes what can be called for a schedule, and traces numbers.)

    Args:
      rule: `"ng-gnn"`, `"ng-t"` and `"nfn"` read the network as a graph, `"ff"` every scalar for itself,
        `"celo2"` each relative to its tensor, `"lstm"` runs over the tensors of the network, `"coordinatewise-lstm"`
        along the steps, in the sizes of `RULES`, and with `step="paper"` of `PAPER_RULES`; or a rule of another size,
        as `FFRule(width=32)`.
      spec: of the architecture, as `trace_spec` makes it. It is the graph of rules that read one and tells `"lstm"` the
        order of the layers; it may have more parameters than the tree, whose edges are then left out, and be of all
        variables of a Linen module where the tree is `variables["params"]`. Without one,
        graphs are inferred from names and shapes, which assumes a chain of layers that are called in the order of their
        names (`infer_spec` says what this misses: branches, residual blocks, blocks in Linen that call a layer on
        another one made later). Where that is refused, as for normalization layers, one warning says so and every
        scalar is updated without a graph; `"lstm"` takes the order of the names, see `natural_layer_order`.
      meta_params: what `load_meta_params` read, which has to be of this rule and step; or the arrays alone, as
        `init_meta_params` returns them, which may be traced, so that gradients with respect to them can be taken;
        `None` for those that come with the package.
      step: `"normalized"`: momentum plus a learned direction, orthogonalized in matrices and kernels as in Muon, with
        a root mean square of `step_size` over each tensor, times the learning rate; see `normalized_step`. Scalars that
        never had a gradient do not move and do not count; a tensor of one number moves by the learning rate.
        `"paper"`: direction and magnitude are learned. Meta-parameters belong to the one they were meta-trained with.
      learning_rate: what a step is multiplied by, a number or a function of the steps taken; `None` for 1 with
        `"paper"`, and 0.01 with `"normalized"`.
      weight_decay: the learning rate times this times the parameters is subtracted, as in AdamW.
      weight_decay_mask: which parameters decay, as `mask` of AdamW: a tree of booleans like the parameters or a prefix
        of it, but not one boolean, or a function from the parameters to such a tree. `None` for all.
      clip: greatest size of each number of a step, before it is multiplied by the learning rate.
      dtype: of the rule's computation, as `"bfloat16"`; state and updates stay float32.
      chunk: scalars that the rule's perceptron, and the LSTM of `"coordinatewise-lstm"`, sees at a time; `None` for all
        of a tensor. It bounds the memory that this takes, and on CPU keeps it in the cache: with
        `2**14`, large networks are updated faster.
        Where an update is differentiated, each chunk is computed again: `2**10` makes meta-training faster on CPU.

    Raises:
      ValueError: an unknown rule or step; no meta-parameters where none are shipped; those of another rule, size or
        step; a negative number; a dtype that JAX does not compute in. `init`: a leaf that the spec does not have; a
        network too large for NG-T.
        `update`: no `params`; other leaves than those `init` saw.
      TypeError: meta-parameters, parameters or gradients that are not real floating arrays; a spec, a number or a state
        that is none.
    """
    found = find_rule(rule, step)
    if spec is not None and not isinstance(spec, NeuralGraphSpec):
        raise TypeError(f"spec: expected a NeuralGraphSpec, as trace_spec makes it; received {type(spec).__name__}")
    if isinstance(meta_params, MetaFile):
        check_made_for(meta_params, rule, step, "meta_params")
        meta_params = meta_params.theta
    if meta_params is None and isinstance(rule, str):
        meta_params = shipped_meta_params(rule, step)

    def layout_of(leaves: Leaves) -> Layout:
        names = tuple(leaves.paths), tuple(leaves.shapes)
        if not leaves.paths:
            return Layout(())
        if not isinstance(found, GraphRule):
            return Layout(natural_layer_order(*names) if spec is None else spec_layer_order(spec, *names))
        inferred = inferred_spec(*names, tuple(leaves.left_out)) if spec is None else list_spec(spec, *names)
        return Layout(range(len(leaves.paths)), inferred)

    return learned_opt(
        found,
        layout_of,
        meta_params=meta_params,
        step=step,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        clip=clip,
        dtype=dtype,
        chunk=chunk,
    )


def learned_opt(
    rule: Rule,
    layout_of: LayoutOf,
    *,
    meta_params: Mapping[str, Any] | None,
    step: str,
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: float | Array = 0.0,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    clip: float | Array | None = None,
    dtype: Any = "float32",
    chunk: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`ng_learned_opt` for any layout of the leaves. Other arguments and errors as there."""
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay), ("clip", clip)):
        if value is not None and not (name == "learning_rate" and callable(value)):
            _check_amount(name, value)
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"dtype: expected a floating type that JAX computes in, as bfloat16; received {dtype}")
    step_of, default_rate = _STEPS[step]
    rate = default_rate if learning_rate is None else learning_rate
    theta = checked_meta_params(rule, meta_params)
    if chunk is not None and operator.index(chunk) < 1:
        raise ValueError(f"chunk: expected a number of scalars of at least 1, received {chunk}")
    applied = computing(rule, dtype, chunk)

    def init(params: PyTree) -> LearnedOptState:
        leaves = read_leaves("parameter", params)
        layout = layout_of(leaves)  # a spec that does not fit is refused here
        if layout.spec is not None and isinstance(applied, GraphRule) and isinstance(applied.backbone, NGT):
            applied.backbone.check_memory(layout.spec.num_nodes)
        momenta = tuple(
            jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=jnp.float32), params) for _ in MOMENTUM_DECAYS
        )
        carry = None
        if isinstance(rule, CoordinatewiseLSTMRule):
            size = 2 * rule.width
            carry = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[..., None], (*leaf.shape, size)), momenta[0])
        return LearnedOptState(jnp.zeros((), jnp.int32), momenta, carry)

    def update(
        updates: PyTree, state: LearnedOptState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, LearnedOptState]:
        del extra_args
        if params is None:
            raise ValueError("argument params is missing: a learned optimizer needs update(gradients, state, params)")
        if not isinstance(state, LearnedOptState):
            raise TypeError(f"state: expected what init returned, a LearnedOptState; received {type(state).__name__}")
        carry = read_leaves("carry", state.carry)
        momenta = [read_leaves("momentum", tree) for tree in state.momenta]
        gradients, values = read_leaves("gradient", updates), read_leaves("parameter", params)
        carry_shapes = [
            (*shape, 2 * rule.width) for shape in momenta[0].shapes if isinstance(rule, CoordinatewiseLSTMRule)
        ]
        if carry.shapes != carry_shapes:
            raise ValueError(f"state: its carry is not one that init of this {type(rule).__name__} returned")
        check_same(momenta[0], gradients)
        check_same(momenta[0], values)
        sharded_gradients = list(map(_sharded_as, gradients.arrays, values.arrays))
        new_momenta = [
            _update_momenta(old, gradient)
            for gradient, *old in zip(sharded_gradients, *(m.arrays for m in momenta), strict=True)
        ]
        features = [
            _features(rule.reads.of, *leaf) for leaf in zip(values.arrays, sharded_gradients, new_momenta, strict=True)
        ]
        heads, new_carry = _apply(applied, theta, features, carry.arrays, layout_of(values))
        factor = jnp.asarray(rate(state.count) if callable(rate) else rate, jnp.float32)

        def total(head: Array, value: Array, gradient: Array, momenta: Sequence[Array], decays: bool) -> Array:
            taken = step_of(head, gradient, momenta)
            if clip is not None:
                taken = jnp.clip(taken, -clip, clip)
            if decays:
                taken = taken - weight_decay * value.astype(jnp.float32)
            return (factor * taken).astype(value.dtype)

        decays = [True] * len(heads)
        if weight_decay_mask is not None:
            decays = read_mask("weight_decay_mask", weight_decay_mask, params)
        if isinstance(weight_decay, (int, float)) and weight_decay == 0:
            decays = [False] * len(heads)
        columns = heads, values.arrays, sharded_gradients, new_momenta, decays
        new_updates = [total(*leaf) for leaf in zip(*columns, strict=True)]
        new_state = LearnedOptState(
            optax.safe_increment(state.count),
            tuple(m.treedef.unflatten(column) for m, column in zip(momenta, _columns(new_momenta), strict=True)),
            carry.treedef.unflatten(new_carry),
        )
        return gradients.treedef.unflatten(new_updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_amount(name: str, value: Any) -> None:
    """Raises where a number is none, negative or NaN; numbers that are traced cannot be looked at."""
    if not isinstance(value, (int, float, np.number, np.ndarray, jax.Array)) or np.ndim(value):
        raise TypeError(f"{name}: expected a number, received {value!r}")
    if not isinstance(value, jax.core.Tracer) and not value >= 0:
        raise ValueError(f"{name}: expected a number of at least 0, received {value}")


# What follows is compiled also where the caller does not: one operation after the other, an update takes many times as
# long.
_update_momenta = jax.jit(update_momenta)


@functools.partial(jax.jit, static_argnums=0)
def _features(of: Callable[..., Array], value: Array, gradient: Array, momenta: Sequence[Array]) -> Array:
    return of(value, gradient, momenta)


@jax.jit
def _normalized(head: Array, gradient: Array, momenta: Sequence[Array]) -> Array:
    return _in_auto_mode(normalized_step, (head, gradient, momenta), like=gradient)


_STEPS: dict[str, tuple[Callable[[Array, Array, Sequence[Array]], Array], float]] = {
    # From the head's two numbers, gradient and momenta to the step, and the learning rate where none is given.
    "normalized": (_normalized, 0.01),
    "paper": (lambda head, *_: paper_step(head), 1.0),
}


def _apply(
    rule: Rule,
    theta: Mapping[str, Any],
    features: Sequence[Float[Array, "..."]],
    carry: Sequence[Float[Array, "..."]],
    layout: Layout,
) -> tuple[list[Float[Array, "..."]], list[Float[Array, "..."]]]:
    """Heads `[*shape, 2]` and new carry, of features and carry that are not in the order of the layers.

    Nothing is carried, before and after, where the rule is not recurrent.
    """
    if not features:
        return [], []
    inputs = tuple(tuple(part[i] for i in layout.order) for part in (features, carry) if part)
    results = [dict(zip(layout.order, part, strict=True)) for part in _heads(rule, theta, inputs, layout.spec)]
    heads, *new_carry = ([by_leaf[i] for i in range(len(features))] for by_leaf in results)
    return heads, new_carry[0] if new_carry else []


@functools.partial(jax.jit, static_argnums=(0, 3))
def _heads(
    rule: Rule,
    theta: Mapping[str, Any],
    inputs: tuple[tuple[Float[Array, "..."], ...], ...],
    spec: NeuralGraphSpec | None,
) -> tuple[tuple[Float[Array, "..."], ...], ...]:
    """`(heads,)` of `(features,)`, or `(heads, carry)` of `(features, carry)`."""

    def function(theta: Mapping[str, Any], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if isinstance(rule, GraphRule):
            return (rule.apply({"params": theta}, *inputs, spec),)
        result = typing.cast(tuple[Any, ...], rule.apply({"params": theta}, *inputs))
        return result if isinstance(rule, CoordinatewiseLSTMRule) else (result,)

    return typing.cast(tuple[Any, ...], _in_auto_mode(function, (theta, inputs), like=inputs))


def _in_auto_mode(function: Callable[..., Any], arguments: tuple[Any, ...], like: Any) -> Any:
    """`function(*arguments)`, whose results are sharded as `like`, with shardings inside left to the compiler.

    A graph brings tensors of different shardings together, and matrices and chunks are made of several axes, which
    explicit axes would have to be told how to.
    """
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return function(*arguments)
    shardings = jax.tree.map(lambda array: jax.typeof(array).sharding, like)
    return jax.sharding.auto_axes(function, out_sharding=shardings)(*arguments)


def _sharded_as(array: Array, like: Array) -> Array:
    """The array in the sharding of another one of its shape, where shardings are part of types (explicit axes)."""
    if not jax.sharding.get_abstract_mesh().explicit_axes:
        return array
    return jax.reshard(array, jax.typeof(like).sharding)


def _columns(rows: Sequence[Sequence[Array]]) -> list[list[Array]]:
    return [[row[k] for row in rows] for k in range(len(MOMENTUM_DECAYS))]
