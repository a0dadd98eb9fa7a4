"""`trace_spec`: the spec of any JAX function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngjax.spec import NeuralGraphSpec, ParamSpec, flatten_with_path, format_path, path_keys, repeated_params
from ngjax.trace.assemble import assemble
from ngjax.trace.axes import letter, pin, unify
from ngjax.trace.layers import Acts, Layers, Value, Weights
from ngjax.trace.program import Program, live_equations
from ngjax.trace.rules import Words
from ngjax.trace.weights import whole

# Raised where Python asks an abstract array for its values.
_CONCRETE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def trace_spec(
    apply_fn: Callable[..., Any], params: Any, *inputs: Any, carries: Mapping[int, int] | None = None, **kwargs: Any
) -> NeuralGraphSpec:
    """The spec of a network, read from what its function does with its parameters.

    Follows the function's jaxpr: every axis of every array gets the permutations under which the function provably
    stays the same, and every parameter its neurons or edges. What cannot be proven is pinned, with the primitive that
    pinned it in `spec.pinned`.

    An output whose path and shape repeat a leaf of `params` (an update, new running statistics) moves as that leaf
    does; other outputs keep their order, and so do inputs.

    Args:
      apply_fn: `apply_fn(params, *inputs, **kwargs)`, in evaluation mode: dropout would pin what it is applied to.
      params: the pytree of everything that moves with the neurons, running statistics too. Leaves may be abstract
        (`jax.ShapeDtypeStruct`); integer and key leaves have no home, other leaves (activation functions in Equinox
        modules) are static.
      inputs: example arguments, abstract or not; only shapes and dtypes matter.
      carries: for inputs that are a state (of an LSTM cell): from the input's number to that of the output, counted
        along the tuple of results, whose neurons are the same.
      kwargs: static arguments of the function (`train=False`).

    Raises:
      TypeError: complex parameters, or an output that is no array.
      ValueError: no floating parameters, or none that the function uses; one without entries; a function whose control
        flow depends on values; carries that are not among the inputs and results, or differ in shape.
    """
    pairs, treedef = flatten_with_path(params)
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for _, leaf in pairs]
    arrays = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for (_, leaf), array in zip(pairs, is_array, strict=True) if array
    ]
    for (path, leaf), array in zip(pairs, is_array, strict=True):
        if array and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"parameter {format_path(path)} is {leaf.dtype}: split it into real and imaginary leaves, which have a "
                "place in a neural graph"
            )
        if array and 0 in leaf.shape:
            raise ValueError(f"parameter {format_path(path)} {tuple(leaf.shape)} has no entries: leave it out")
    if not any(jnp.issubdtype(array.dtype, jnp.floating) for array in arrays):
        raise ValueError("expected a pytree with at least one floating parameter, received none")

    def function(leaves: list[Any], inputs: Any) -> Any:
        left = iter(leaves)
        tree = jax.tree.unflatten(
            treedef, [next(left) if array else leaf for (_, leaf), array in zip(pairs, is_array, strict=True)]
        )
        return apply_fn(tree, *inputs, **kwargs)

    try:
        closed, out_shapes = jax.make_jaxpr(function, return_shape=True)(arrays, inputs)
    except _CONCRETE as error:
        raise ValueError(
            "the function's control flow depends on values, so that one trace does not describe it; use jax.lax.cond "
            f"or jnp.where ({error})"
        ) from error
    paths = [path for (path, _), array in zip(pairs, is_array, strict=True) if array]
    specs = [ParamSpec(p, tuple(a.shape), str(a.dtype)) for p, a in zip(paths, arrays, strict=True)]
    program = Program(Layers([format_path(path) for path in paths]))
    words: list[Words] = [tuple(letter(n) for n in array.shape) for array in arrays]
    values = [
        Value(w, Weights((whole(i, spec.shape),)) if spec.is_floating else Weights())
        for i, (w, spec) in enumerate(zip(words, specs, strict=True))
    ]
    for w, spec in zip(words, specs, strict=True):
        if not spec.is_floating:
            for word in w:
                pin(word, "not floating")
    flat_inputs = [jax.tree.leaves(item) for item in inputs]
    carried = dict(carries or {})
    _check_carries(carried, inputs, out_shapes)
    for number, item in enumerate(flat_inputs):
        for leaf in item:
            shape = np.shape(leaf)
            reason = "" if number in carried else "input"
            values.append(Value(tuple(letter(n, reason) for n in shape), Acts(is_input=True)))
    input_values = values[len(words) :]
    results = program.run(closed.jaxpr, closed.consts, values)
    _outputs(results, out_shapes, specs, words, input_values, flat_inputs, carried)
    used = live_equations(closed.jaxpr)[1]
    if not any(id(var) in used for var in closed.jaxpr.invars[: len(words)]):
        raise ValueError("the function uses none of the parameters it is given: does it close over others?")
    for i in (i for i, var in enumerate(closed.jaxpr.invars[: len(words)]) if id(var) not in used):
        for word in words[i]:
            pin(word, "used by no equation")
    labels = [ids for value in results if isinstance(value.flow, Acts) for ids in value.flow.labels]
    program.arrays += [w for w in words if w]
    homes = [w if spec.is_floating else () for w, spec in zip(words, specs, strict=True)]
    static = all(is_array)
    return assemble(program, specs, homes, labels, treedef if static else None)


def _outputs(
    results: list[Value],
    shapes: Any,
    specs: list[ParamSpec],
    words: list[Words],
    inputs: list[Value],
    flat_inputs: list[list[Any]],
    carried: dict[int, int],
) -> None:
    """Outputs keep their order, except those that are the parameters or a state again."""
    pairs, _ = flatten_with_path(shapes)
    starts = np.cumsum([0, *map(len, flat_inputs)])
    state: dict[int, list[Words]] = {
        out: [value.words for value in inputs[starts[number] : starts[number + 1]]] for number, out in carried.items()
    }
    repeated = repeated_params(specs, [(path, shape.shape) for path, shape in pairs])
    for (path, _), same, value in zip(pairs, repeated, results, strict=True):
        keys = path_keys(path)
        if keys and keys[0] in state:
            for a, b in zip(value.words, state[keys[0]].pop(0), strict=True):
                unify(a, b, "output")
        elif same is not None:
            for a, b in zip(value.words, words[same], strict=True):
                unify(a, b, "output")
        else:
            for word in value.words:
                pin(word, "output")


def _check_carries(carries: Mapping[int, int], inputs: Sequence[Any], outputs: Any) -> None:
    """Raises where a state is not among the inputs, not among the results, or another tree there."""
    for number, out in carries.items():
        if not 0 <= number < len(inputs):
            raise ValueError(f"carries names input {number}, but the function was given {len(inputs)} inputs")
        if not isinstance(outputs, (tuple, list)) or not 0 <= out < len(outputs):
            many = f"{len(outputs)} results" if isinstance(outputs, (tuple, list)) else "no tuple of results"
            raise ValueError(f"carries names output {out}, but the function returns {many}")
        given, returned = (jax.tree.map(np.shape, tree) for tree in (inputs[number], outputs[out]))
        if given != returned:
            raise ValueError(f"carries: expected output {out} to be as input {number}, {given}, received {returned}")
    if len(set(carries.values())) < len(carries):
        raise ValueError(f"carries: expected an output of its own for each input, received {dict(carries)}")
