"""What no spec can be read from raises with advice, and what cannot be followed is pinned by name, never guessed."""

import functools

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.interpreters import batching, mlir

import ngjax
from ngjax.spec import format_path
from tests.trace.test_networks import deviation, free_groups
from tests.trace.test_traps import hidden, random_params

FREE = [(6, 1)]
X = jax.ShapeDtypeStruct((5, 4), jnp.float32)


def trace(function, params=None, x=X):
    return ngjax.trace_spec(function, random_params(0) if params is None else params, x)


def reasons(spec):
    """What pinned which axis of which parameter."""
    return {axis: pinned.reason for pinned in spec.pinned for axis in pinned.axes}


def axes_of(spec, name):
    return next(param.axes for param in spec.params if format_path(param.path) == name)


def assert_comes_back(spec, params):
    again = ngjax.to_params(spec, ngjax.to_groups(spec, params), like=params)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


# -- parameters without a use ------------------------------------------------------------------------------------------


def in_a_call(p, x):
    return jax.jit(lambda p, x: hidden(p, x) @ p["e"])(p, x)


def in_a_checkpoint(p, x):
    return jax.checkpoint(lambda p, x: hidden(p, x) @ p["e"])(p, x)


def in_a_loop(p, x):
    def step(h, _):
        return jnp.tanh(h @ p["c"]), (p["d"], p["f"])[:0]

    return jax.lax.scan(step, hidden(p, x), None, length=2)[0] @ p["e"]


def in_a_branch(p, x):
    return jax.lax.cond(x[0, 0] > 0, lambda p: hidden(p, x) @ p["e"], lambda p: -hidden(p, x) @ p["e"], p)


def in_nothing_that_is_read(p, x):
    h = hidden(p, x)
    _ = (h @ p["c"], h[:, 0] * p["f"][0], p["d"].sum(), jnp.cumsum(h, -1))
    return h @ p["e"]


@pytest.mark.parametrize(
    "function", [lambda p, x: hidden(p, x) @ p["e"], in_a_call, in_a_checkpoint, in_a_branch, in_nothing_that_is_read]
)
def test_parameters_used_by_no_equation_are_pinned_and_named(function):
    params = random_params(0)
    spec = trace(function)
    assert free_groups(spec) == FREE
    unused = {name: params[name] for name in "cdfg"}
    named = {axis for axis, reason in reasons(spec).items() if reason == "used by no equation"}
    assert named == {(name, axis) for name, leaf in unused.items() for axis in range(leaf.ndim)}
    assert spec.num_loose == sum(leaf.size for leaf in unused.values())
    assert_comes_back(spec, params)


def test_a_parameter_that_is_used_inside_a_loop_alone_is_used():
    spec = trace(in_a_loop)
    assert free_groups(spec) == FREE
    assert "used by no equation" not in {reasons(spec).get(("c", axis)) for axis in range(2)}
    assert {reasons(spec)[name, 0] for name in "dfg"} == {"used by no equation"}


def test_an_output_that_reads_no_input_and_an_input_that_nobody_reads():
    spec = ngjax.trace_spec(lambda p, x, y: (hidden(p, x) @ p["e"], jnp.ones(3)), random_params(0), X, X)
    assert free_groups(spec) == FREE


def test_a_function_that_uses_no_parameter():
    params = random_params(0)
    with pytest.raises(ValueError, match="none of the parameters.*close over"):
        trace(lambda p, x: hidden(params, x), params)


@pytest.mark.parametrize("function", [lambda p, x: x * p["g"].sum(), lambda p, x: p["g"].mean()])
def test_a_function_in_which_no_parameter_has_neurons(function):
    params = random_params(0)
    spec = trace(function)
    assert free_groups(spec) in ([], [(2, 1), (3, 1)])  # a sum has no order
    assert spec.num_loose <= sum(leaf.size for leaf in params.values())
    assert_comes_back(spec, params)


# -- functions that cannot be traced -----------------------------------------------------------------------------------


def if_positive(p, x):
    return hidden(p, x) @ p["e"] if x.sum() > 0 else x @ p["a"]


def while_large(p, x):
    h = hidden(p, x)
    while jnp.abs(h).max() > 1:
        h = h / 2
    return h @ p["e"]


def if_a_weight_is(p, x):
    return hidden(p, x) @ p["e"] if p["b"][0] else x @ p["a"]


def times_of_a_value(p, x):
    return sum(hidden(p, x) @ p["e"] for _ in range(int(jnp.abs(x).sum())))


def index_of_python(p, x):
    return ["a", "b"][jnp.argmax(x)]


def through_numpy(p, x):
    return hidden(p, np.sin(np.asarray(x))) @ p["e"]


def as_many_as_are_positive(p, x):
    return hidden(p, x)[x[:, 0] > 0] @ p["e"]


def item_of(p, x):
    return hidden(p, x) @ p["e"] * float(x[0, 0])


@pytest.mark.parametrize(
    "function",
    [
        if_positive,
        while_large,
        if_a_weight_is,
        times_of_a_value,
        index_of_python,
        through_numpy,
        as_many_as_are_positive,
        item_of,
    ],
)
def test_what_depends_on_values_raises_with_advice(function):
    with pytest.raises(ValueError, match="depends on values.*jax.lax.cond") as error:
        trace(function)
    assert isinstance(error.value.__cause__, (jax.errors.JAXTypeError, jax.errors.JAXIndexError))


@pytest.mark.parametrize("params", [{}, [], None, {"n": np.arange(3)}, {"key": jax.random.key(0)}, {"f": jnp.tanh}])
def test_nothing_to_trace(params):
    with pytest.raises(ValueError, match="at least one floating parameter"):
        ngjax.trace_spec(lambda p, x: x, params, X)


def test_an_output_that_is_no_array():
    with pytest.raises(TypeError):
        trace(lambda p, x: {"logits": hidden(p, x), "name": "hidden"})


def test_a_result_that_only_sits_where_a_parameter_sits_keeps_its_order():
    """In lists and tuples every place has the same name; only all parameters together are parameters again."""
    square, shapes = jax.ShapeDtypeStruct((4, 4), jnp.float32), [(4, 6), (6,)]
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    spec = ngjax.trace_spec(lambda p, x: (jnp.tanh(x @ p[0] + p[1]), x.sum()), params, square)
    assert free_groups(spec) == []
    spec = ngjax.trace_spec(lambda p, x: [p[0] - x.mean() * p[0], p[1] + p[0].sum(0)], params, square)
    assert free_groups(spec) == [(4, 6)]  # an update: the entries of each column, whose sums have no order


def step(p, carry):
    return jnp.tanh(carry @ p["w"]), carry.sum()


CARRIES = {
    "no such output": (step, {0: 7}),
    "an output counted from the end": (step, {0: -2}),
    "no such input": (step, {1: 0}),
    "an output of another rank": (step, {0: 1}),
    "an output of another size": (lambda p, carry: (jnp.tanh(carry @ p["w"])[:, :3], carry.sum()), {0: 0}),
    "not a tuple of results": (lambda p, carry: jnp.tanh(carry @ p["w"]), {0: 0}),
    "a dict of results": (lambda p, carry: {"h": jnp.tanh(carry @ p["w"])}, {0: 0}),
    "more leaves": (lambda p, carry: ((jnp.tanh(carry @ p["w"]), carry), carry.sum()), {0: 0}),
}


@pytest.mark.parametrize("name", CARRIES)
def test_carries_that_do_not_fit_raise(name):
    """A state that would be tied to nothing would be free, though the function's results change with its order."""
    function, carries = CARRIES[name]
    params, carry = {"w": jnp.ones((5, 5))}, jnp.ones((2, 5))
    assert free_groups(ngjax.trace_spec(step, params, carry, carries={0: 0})) == [(5, 1)]
    with pytest.raises(ValueError, match="carries"):
        ngjax.trace_spec(function, params, carry, carries=carries)


def test_two_states_of_one_result_raise():
    with pytest.raises(ValueError, match="carries"):
        ngjax.trace_spec(
            lambda p, a, b: (jnp.tanh(a @ p["w"]) + b.sum(), b),
            {"w": jnp.ones((5, 5))},
            *[jnp.ones((2, 5))] * 2,
            carries={0: 0, 1: 0},
        )


@pytest.mark.parametrize("where", ["parameter", "inside"])
def test_complex_parameters(where):
    params = random_params(0)
    if where == "parameter":
        with pytest.raises(TypeError, match="parameter a is complex64.*real and imaginary"):
            trace(hidden, params | {"a": params["a"].astype(jnp.complex64)})
    else:  # numbers inside may be complex
        spec = trace(lambda p, x: jnp.abs(jnp.exp(1j * hidden(p, x).astype(jnp.complex64))) @ p["e"])
        assert free_groups(spec) == FREE


def test_a_leaf_without_entries_raises_and_one_of_one_entry_does_not():
    params = random_params(0) | {"one": jnp.ones((1,)), "scalar": jnp.float32(2)}

    def function(p, x):
        return hidden(p, x) * p["one"] * p["scalar"] @ p["e"]

    spec = trace(function, params)
    assert free_groups(spec) == FREE
    assert_comes_back(spec, params)
    with pytest.raises(ValueError, match=r"parameter none \(0, 6\) has no entries"):
        trace(function, params | {"none": jnp.zeros((0, 6))})


# -- leaves that are not floating --------------------------------------------------------------------------------------


OTHERS = {
    "steps": jnp.int32(3),
    "order": jnp.array([3, 1, 2, 0, 5, 4]),
    "mask": jnp.array([True, False, True, True, False, True]),
    "key": jax.random.key(3),
    "old key": jax.random.PRNGKey(3),
    "quantized": jnp.arange(36, dtype=jnp.int8).reshape(6, 6),
}


@pytest.mark.parametrize("name", OTHERS)
def test_integers_and_keys_have_no_home_and_come_from_like(name):
    params = random_params(0) | {name: OTHERS[name]}
    spec = trace(lambda p, x: hidden(p, x) @ p["e"], params)
    assert axes_of(spec, name) == ()
    assert free_groups(spec) == FREE
    assert_comes_back(spec, params)
    moved = ngjax.permute_params(spec, ngjax.random_permutations(jax.random.key(0), spec), params)
    assert moved[name] is params[name] or np.array_equal(*map(jax.random.key_data, (moved[name], params[name])))
    with pytest.raises(ValueError, match="like"):
        ngjax.to_params(spec, ngjax.to_groups(spec, params))


NOT_FLOATING = {
    "steps": (lambda p, h: h * jnp.sqrt(p["steps"].astype(jnp.float32)), FREE),
    "order": (lambda p, h: h[:, p["order"]], []),
    "mask": (lambda p, h: jnp.where(p["mask"], h, 0.0), []),
    "key": (lambda p, h: jnp.where(jax.random.bernoulli(p["key"], 0.5, h.shape), h, 0.0), []),
    "old key": (lambda p, h: h + jax.random.normal(p["old key"], (6,)), []),
    "quantized": (lambda p, h: h @ (p["quantized"].astype(jnp.float32) * p["f"]), []),
}


@pytest.mark.parametrize("name", NOT_FLOATING)
def test_neurons_that_integers_and_keys_tell_apart_are_pinned(name):
    """They stay where they are when weights are shuffled."""
    apply, free = NOT_FLOATING[name]
    spec = trace(lambda p, x: apply(p, hidden(p, x)) @ p["e"], random_params(0) | {name: OTHERS[name]})
    assert free_groups(spec) == free
    assert free or reasons(spec)["a", 1] not in ("", "output", "input")


def test_noise_without_places_pins_nothing():
    def function(p, x):
        return hidden(p, x) * jax.random.normal(p["key"], (x.shape[0], 1)) @ p["e"]

    assert free_groups(trace(function, random_params(0) | {"key": OTHERS["key"]})) == FREE


# -- effects -----------------------------------------------------------------------------------------------------------


def test_printing_and_calling_back_happen_at_no_time_and_pin_what_they_see():
    calls = []

    def note(h):
        calls.append(h)
        return np.asarray(h)

    def sorted_outside(h):
        return jax.pure_callback(lambda h: np.sort(h, -1), jax.ShapeDtypeStruct(h.shape, h.dtype), h)

    def noted(h, **kwargs):
        return io_callback(note, jax.ShapeDtypeStruct(h.shape, h.dtype), h, **kwargs)

    seen = {
        "io_callback": [noted, functools.partial(noted, ordered=True)],
        "pure_callback": [sorted_outside],
    }
    for name, functions in seen.items():
        for function in functions:
            spec = trace(lambda p, x, function=function: function(hidden(p, x)) @ p["e"])
            assert free_groups(spec) == []
            assert reasons(spec)["a", 1] == name
    # A result that nobody needs: the callback sees the neurons in their order all the same.
    spec = trace(lambda p, x: (noted(hidden(p, x), ordered=True), hidden(p, x) @ p["e"])[1])
    assert free_groups(spec) == []
    assert calls == []


@pytest.mark.parametrize("ordered", [False, True])
def test_what_is_printed_has_an_order(ordered):
    """Printing is there to be read: what it shows stays where it is, and what it does not show is as free as before."""

    def shown(p, x):
        h = hidden(p, x)
        jax.debug.print("{}", h, ordered=ordered)
        return jnp.tanh(h @ p["c"]) @ p["e"]

    def mean_shown(p, x):
        h = hidden(p, x)
        jax.debug.print("{}", h.mean(), ordered=ordered)
        return jnp.tanh(h @ p["c"]) @ p["e"]

    spec = trace(shown)
    assert free_groups(spec) == FREE  # the second layer
    assert reasons(spec)["a", 1] in ("debug_callback", "debug_print")
    assert free_groups(trace(mean_shown)) == [(6, 1), (6, 1)]


def test_references_do_not_hide_what_flows_through_them():
    def rolled(p, x):
        ref = jax.new_ref(hidden(p, x))
        ref[:, :3] = ref[:, 3:]
        return ref[...] @ p["e"]

    assert free_groups(trace(rolled)) == []

    def in_a_loop(p, x):
        ref = jax.new_ref(hidden(p, x))

        def step(i, _):
            ref[...] = jnp.roll(ref[...], 1, -1)

        jax.lax.fori_loop(0, 2, step, None)
        return (ref[...] + hidden(p, x)) @ p["e"]

    assert free_groups(trace(in_a_loop)) == []


# -- primitives that are not known -------------------------------------------------------------------------------------


def primitive(name, compute):
    """A primitive of one array with the result's shape that of the operand."""
    made = jex.core.Primitive(name)
    made.def_impl(lambda x, **params: compute(x, **params))
    made.def_abstract_eval(lambda x, **params: x)
    mlir.register_lowering(made, mlir.lower_fun(lambda x, **params: compute(x, **params), multiple_results=False))
    batching.defvectorized(made)
    return made


REVERSED = primitive("reversed_neurons", lambda x: x[..., ::-1])
# Applies its jaxpr to another array than its operand, which a call would not do.
REVERSED_CALL = primitive(
    "reversed_call", lambda x, *, jaxpr: jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, x[..., ::-1])[0]
)
TWICE = primitive("twice", lambda x, *, call_jaxpr: x)


def test_an_unknown_primitive_is_pinned_by_name():
    spec = trace(lambda p, x: (REVERSED.bind(hidden(p, x)) + hidden(p, x)) @ p["e"])
    assert free_groups(spec) == []
    assert reasons(spec)["a", 1] == reasons(spec)["e", 0] == "reversed_neurons"


@pytest.mark.parametrize("name", ["reversed_call", "twice"])
def test_a_primitive_with_a_jaxpr_is_not_taken_for_a_call(name):
    def function(p, x):
        h = hidden(p, x)
        jaxpr = jax.make_jaxpr(jnp.tanh)(h)
        called = REVERSED_CALL.bind(h, jaxpr=jaxpr) if name == "reversed_call" else TWICE.bind(h, call_jaxpr=jaxpr)
        return (called + h) @ p["e"]

    spec = trace(function)
    assert free_groups(spec) == []
    assert reasons(spec)["a", 1] == name


def test_a_kernel_is_pinned():
    def kernel(x, out):
        out[...] = x[...][:, ::-1]

    def function(p, x):
        h = hidden(p, x)
        call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(h.shape, h.dtype), interpret=True)
        return (call(h) + h) @ p["e"]

    spec = trace(function)
    assert free_groups(spec) == []
    assert reasons(spec)["a", 1] == "pallas_call"


def test_neurons_spread_over_devices_are_pinned():
    mesh = jax.make_mesh((2,), ("neurons",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    over = jax.sharding.PartitionSpec(None, "neurons")
    reversed_halves = jax.shard_map(lambda h: h[:, ::-1], mesh=mesh, in_specs=over, out_specs=over)
    spec = trace(lambda p, x: (reversed_halves(hidden(p, x)) + hidden(p, x)) @ p["e"])
    assert free_groups(spec) == []
    assert reasons(spec)["a", 1] == "shard_map"


@jax.custom_jvp
def with_own_derivative(x):
    return jnp.tanh(x)


with_own_derivative.defjvps(lambda t, y, x: t)


@jax.custom_vjp
def with_own_gradient(x):
    return jnp.tanh(x)


with_own_gradient.defvjp(lambda x: (jnp.tanh(x), None), lambda _, t: (t,))


CALLS = {
    "jit": jax.jit(jnp.tanh),
    "checkpoint": jax.checkpoint(jnp.tanh),
    "custom_jvp": with_own_derivative,
    "custom_vjp": with_own_gradient,
    "named": jax.named_call(jnp.tanh),
    "vmap of jit": jax.vmap(jax.jit(jnp.tanh)),
    "jit of jit": jax.jit(lambda x: jax.jit(jnp.tanh)(x) + jax.jit(jnp.sin)(x)),
}


@pytest.mark.parametrize("name", CALLS)
def test_known_calls_are_followed(name):
    assert free_groups(trace(lambda p, x: CALLS[name](hidden(p, x)) @ p["e"])) == FREE
    # And they hide nothing.
    assert free_groups(trace(lambda p, x: jnp.cumsum(CALLS[name](hidden(p, x)), -1) @ p["e"])) == []


# -- places that are mixed ---------------------------------------------------------------------------------------------


def windows(h):
    rows = h.transpose(0, 2, 1).reshape(-1, 2, 1)
    rows = jax.lax.conv_general_dilated(
        rows, jnp.ones((2, 1, 1)), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return rows.reshape(-1, 3, 2).transpose(0, 2, 1)


def into_others(h):
    return jax.ops.segment_sum(h.swapaxes(0, 1), jnp.array([1, 0]), 2).swapaxes(0, 1)


MIXED = {
    "reversed": lambda h: h[:, ::-1],
    "running sum": lambda h: jnp.cumsum(h, 1),
    "running maximum": lambda h: jax.lax.cummax(h, 1),
    "sorted": lambda h: jnp.sort(h, 1),
    "convolved": windows,
    "windows": lambda h: jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 2, 1), (1, 1, 1), "SAME"),
    "Fourier transform": lambda h: jnp.abs(jnp.fft.fft(h, axis=1)),
    "scattered": into_others,
    "gathered": lambda h: h[:, jnp.array([1, 0])],
    "chosen": lambda h: jnp.where(jnp.arange(2)[:, None] > 0, h, h[:, ::-1]),
    "shifted": lambda h: jnp.pad(h[:, :1], ((0, 0), (1, 0), (0, 0))),
    "a part of all": lambda h: jax.lax.dynamic_slice_in_dim(h, jnp.argmin(h[0, :, 0]), 1, 1),
    "scanned": lambda h: jax.lax.associative_scan(jnp.add, h, axis=1),
}


@pytest.mark.parametrize("name", MIXED)
def test_places_that_are_mixed_do_not_tell_neurons_apart(name):
    """Where heads are mixed, the neurons inside each may not be shuffled in another way in each."""

    def function(p, x):
        h = hidden(p, x).reshape(-1, 2, 3)
        return (h + MIXED[name](h)).reshape(-1, 6) @ p["e"]

    params, x = random_params(0), jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
    spec = trace(function, params)
    assert free_groups(spec) in ([], [(3, 1)])
    if free_groups(spec):
        assert deviation(function, params, spec, x) < 1e-5
    assert_comes_back(spec, params)


# -- constants ---------------------------------------------------------------------------------------------------------


E = np.random.default_rng(7).normal(size=(6, 3)).astype(np.float32)
CONSTANTS = {
    "numpy": lambda p, x: hidden(p, x) @ E,
    "jax": lambda p, x: hidden(p, x) @ jnp.asarray(E),
    "in jit": lambda p, x: jax.jit(lambda h: h @ E)(hidden(p, x)),
    "in a branch": lambda p, x: jax.lax.cond(
        x[0, 0] > 0, lambda h: h @ E, lambda h: h @ jnp.ones((6, 3)), hidden(p, x)
    ),
    "in a loop": lambda p, x: (
        jax.lax.scan(lambda h, _: (jnp.tanh(h * E[:, 0]), None), hidden(p, x), None, length=2)[0] @ p["e"]
    ),
    "one of several": lambda p, x: hidden(p, x) @ p["e"] + hidden(p, x) @ E,
    "a bias": lambda p, x: jnp.tanh(x @ p["a"] + E[:, 0]) @ p["e"],
    "not a number": lambda p, x: jnp.where(np.array([1, 2, np.nan, 4, 5, 6]) > 2, hidden(p, x), 0.0) @ p["e"],
}


@pytest.mark.parametrize("simplified", [False, True])
@pytest.mark.parametrize("name", CONSTANTS)
def test_neurons_that_meet_a_constant_are_pinned(name, simplified):
    if not simplified or not hasattr(jax.config, "jax_use_simplified_jaxpr_constants"):
        spec = trace(CONSTANTS[name])
    else:
        before = jax.config.jax_use_simplified_jaxpr_constants
        jax.config.update("jax_use_simplified_jaxpr_constants", True)
        try:
            spec = trace(CONSTANTS[name])
        finally:
            jax.config.update("jax_use_simplified_jaxpr_constants", before)
    assert free_groups(spec) == []
    assert reasons(spec)["a", 1] == "constant"


def test_some_parameters_captured_and_others_given():
    params = random_params(0)
    spec = trace(lambda p, x: jnp.tanh(hidden(p, x) @ params["c"]) @ p["e"], {k: params[k] for k in "abe"})
    assert free_groups(spec) == []
    assert reasons(spec)["a", 1] == reasons(spec)["e", 0] == "constant"
    # Neurons between parameters that are all given stay free.
    spec = ngjax.trace_spec(
        lambda p, x: jnp.tanh(hidden(p, x) @ p["c"]) @ params["e"], {k: params[k] for k in "abc"}, X
    )
    assert free_groups(spec) == FREE
    assert reasons(spec)["c", 1] == "constant"


def test_parameters_of_an_outer_trace_captured():
    specs = []

    def outer(params):
        given = {k: params[k] for k in "ab"}
        specs.append(ngjax.trace_spec(lambda p, x: hidden(p, x) @ params["e"], given, X))
        specs.append(ngjax.trace_spec(lambda p, x: hidden(p, x) @ p["e"], params, X))
        return params["e"].sum()

    jax.jit(outer)(random_params(0))
    assert free_groups(specs[0]) == []
    assert reasons(specs[0])["a", 1] == "constant"
    assert free_groups(specs[1]) == FREE


def test_a_constant_that_is_the_same_everywhere_pins_nothing():
    ones = jnp.ones((6, 3))
    assert free_groups(trace(lambda p, x: hidden(p, x) @ ones)) == FREE
    assert free_groups(trace(lambda p, x: jnp.where(np.full(6, np.nan) > 2, hidden(p, x), 1.0) @ p["e"])) == FREE


# -- precision ---------------------------------------------------------------------------------------------------------


def network(p, x):
    h = jax.nn.gelu(x.astype(p["a"].dtype) @ p["a"] + p["b"])
    h = h + jax.nn.silu(h @ p["c"] + p["f"]) @ p["d"]
    h = h / jnp.sqrt(jnp.mean(h.astype(jnp.float32) ** 2, -1, keepdims=True) + 1e-5).astype(h.dtype)
    return jax.nn.softmax(h @ p["e"]) @ p["g"].T


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_spec_does_not_depend_on_precision(dtype):
    params = random_params(0)
    low = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    expected, spec = trace(network, params), trace(network, low)
    assert free_groups(spec) == [(3, 1), (6, 1), (6, 1)]
    assert [p._replace(dtype="float32") for p in spec.params] == list(expected.params)
    assert {p.dtype for p in spec.params} == {dtype}
    assert spec.node_groups == expected.node_groups
    assert spec.edge_groups == expected.edge_groups
    assert spec.actions == expected.actions
    assert_comes_back(spec, low)


def test_parameters_of_several_precisions_come_back_as_they_were():
    params = random_params(0)
    params |= {"b": params["b"].astype(jnp.bfloat16), "e": params["e"].astype(jnp.float16)}

    def function(p, x):
        h = jnp.tanh(x @ p["a"] + p["b"].astype(jnp.float32))
        return h.astype(jnp.float16) @ p["e"]

    spec = trace(function, params)
    assert free_groups(spec) == FREE
    assert_comes_back(spec, params)
