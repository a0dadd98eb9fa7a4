"""`check_symmetry` finds wrong specs, and says where they are wrong."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax

SIZES = (3, 6, 5, 2)
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def fresh(sizes=SIZES):
    """Layers as an initializer makes them: biases are zero, and kernels too in the last layer."""
    rng = np.random.default_rng(0)
    layers = [
        {"kernel": rng.normal(size=(n, m)).astype(np.float32), "bias": np.zeros(m, np.float32)}
        for n, m in itertools.pairwise(sizes)
    ]
    layers[-1]["kernel"] *= 0
    return {f"layer_{i}": layer for i, layer in enumerate(layers)}


def mlp(p, x, move_bias=lambda b: b):
    for i in range(2):
        bias = p[f"layer_{i}"]["bias"]
        x = jnp.tanh(x @ p[f"layer_{i}"]["kernel"] + (move_bias(bias) if i == 1 else bias))
    return x @ p["layer_2"]["kernel"] + p["layer_2"]["bias"]


def check(f, spec=None, params=None, **kwargs):
    spec = spec or ngjax.mlp_spec(SIZES, activation="tanh")
    return ngjax.check_symmetry(f, fresh() if params is None else params, spec, X, key=jax.random.key(0), **kwargs)


def test_a_right_spec_passes():
    report = check(mlp)
    assert 0 < report.deviation < 1e-6
    assert report[2:] == ("", "", (), ())
    assert str(report) == f"largest deviation {report.deviation:.1e} (output <root>)"


def test_zeros_of_a_fresh_initialization_hide_no_error():
    """A rolled bias and a last kernel of zeros change nothing until they are perturbed; the report says where."""
    report = check(functools.partial(mlp, move_bias=lambda b: jnp.roll(b, 1)))
    assert report.deviation > 1e-2
    assert report.worst_leaf == "layer_1/bias"
    assert "layer_1/bias" in str(report)


def test_groups_that_have_to_move_together():
    def residual(p, x):
        h = jnp.tanh(x @ p["layer_0"]["kernel"])
        return (h + jnp.tanh(h @ p["layer_1"]["kernel"])) @ p["layer_2"]["kernel"]

    sizes = (3, 6, 6, 2)
    report = check(residual, ngjax.mlp_spec(sizes), fresh(sizes))
    assert report.deviation > 1e-2
    assert report.unused == ("layer_0/bias", "layer_1/bias", "layer_2/bias")


@pytest.mark.parametrize("seed", range(4))
def test_two_neurons_always_change_places(seed):
    sizes = (3, 2, 2)
    report = ngjax.check_symmetry(
        lambda p, x: (jnp.tanh(x @ p["layer_0"]["kernel"]) * jnp.arange(2.0)) @ p["layer_1"]["kernel"],
        *(fresh(sizes), ngjax.mlp_spec(sizes, activation="tanh"), X),
        key=jax.random.key(seed),
    )
    assert report.deviation > 1e-2


def test_what_is_pinned_and_looks_free():
    def network(p, x):
        return jnp.sort(jnp.tanh(x @ p["a"]), -1).sum(-1) + (jnp.cumsum(jnp.tanh(x @ p["b"]), -1) @ p["c"])[:, 0]

    params = {"a": np.ones((3, 4), np.float32), "b": np.ones((3, 5), np.float32), "c": np.ones((5, 1), np.float32)}
    spec = ngjax.trace_spec(network, params, X)
    (sorted_id,) = {p.axes[1] for p in spec.params if p.path[0].key == "a"}
    assert not spec.is_free(sorted_id)
    report = check(network, spec, params)
    assert report.looks_free == (sorted_id,)
    assert f"pinned, but looks free: {sorted_id}" in str(report)


def test_outputs_that_are_parameters_again_move_with_them():
    def update(p, x):
        return mlp(p, x), jax.tree.map(lambda leaf: 2 * leaf, p)

    assert check(update).deviation < 1e-6

    def wrong(p, x):
        return mlp(p, x), p | {"layer_1": {"bias": jnp.sort(p["layer_1"]["bias"]), "kernel": p["layer_1"]["kernel"]}}

    report = check(wrong)
    assert report.deviation > 1e-2
    assert report.output == "1/layer_1/bias"


def test_half_precision_and_leaves_that_are_no_arrays():
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), fresh()) | {"activation": jnp.tanh}

    def network(p, x):
        h = p["activation"](jnp.asarray(x, jnp.bfloat16) @ p["layer_0"]["kernel"])
        return p["activation"](h @ p["layer_1"]["kernel"]) @ p["layer_2"]["kernel"]

    spec = ngjax.trace_spec(network, params, X)
    assert check(network, spec, params, tolerance=0.05).deviation < 0.02


def test_bad_input_of_check_symmetry():
    with pytest.raises(ValueError, match="without any"):
        check(lambda p, x: None)
    with pytest.raises(ValueError, match=r"output <root> .*not finite"):
        check(lambda p, x: mlp(p, x) / 0)
    with pytest.raises(ValueError, match=r"layer_2/bias .*missing"):
        check(mlp, params={k: v for k, v in fresh().items() if k != "layer_2"})
