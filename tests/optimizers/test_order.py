import jax
import jax.numpy as jnp
import pytest

import ngjax
from ngjax.optimizers import order
from ngjax.spec import flatten_with_path, format_path
from tests.optimizers import small


def natural(tree):
    pairs, _ = flatten_with_path(tree)
    paths = [path for path, _ in pairs]
    return [format_path(paths[i]) for i in order.natural_layer_order(paths, [leaf.shape for _, leaf in pairs])]


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (
            {f"Dense_{i}": {"bias": (1,), "kernel": (1, 1)} for i in (10, 2)},
            ["Dense_2/kernel", "Dense_2/bias", "Dense_10/kernel", "Dense_10/bias"],
        ),
        (
            {f"conv.{i}.{name}": (1,) * rank for i in (8, 10) for name, rank in (("bias", 1), ("weight", 4))},
            ["conv.8.weight", "conv.8.bias", "conv.10.weight", "conv.10.bias"],
        ),
        ([(1, 1), (1,), (1, 1), (1,)], ["0", "1", "2", "3"]),
        ({"b1": (1,), "b2": (1,), "w1": (1, 1), "w2": (1, 1)}, ["w1", "b1", "w2", "b2"]),
        ({"norm": {"bias": (1,), "scale": (1,)}}, ["norm/scale", "norm/bias"]),
        ((), []),
    ],
)
def test_natural_order(tree, expected):
    def is_shape(leaf):
        return isinstance(leaf, tuple) and len(leaf) > 0

    assert natural(jax.tree.map(jnp.zeros, tree, is_leaf=is_shape)) == expected


def test_one_array():
    assert natural(jnp.zeros(3)) == ["<root>"]


def test_spec_orders_by_depth_whatever_the_names():
    spec = ngjax.trace_spec(
        lambda p, x: jnp.tanh(x @ p["stem"]["w"] + p["stem"]["b"]) @ p["head"]["w"] * p["temperature"] + p["head"]["b"],
        {
            "head": {"b": jnp.zeros(2), "w": jnp.zeros((4, 2))},
            "stem": {"b": jnp.zeros(4), "w": jnp.zeros((3, 4))},
            "temperature": jnp.ones(()),
        },
        jnp.zeros((5, 3)),
    )
    paths = [param.path for param in spec.params]
    shapes = [param.shape for param in spec.params]
    names = [format_path(paths[i]) for i in order.spec_layer_order(spec, paths, shapes)]
    assert names[:4] == ["stem/w", "stem/b", "head/w", "head/b"]
    assert names[4:] == ["temperature"]


def test_spec_of_an_mlp_orders_as_its_names_do():
    pairs, _ = flatten_with_path(small.normal(0))
    paths, shapes = [path for path, _ in pairs], [leaf.shape for _, leaf in pairs]
    assert order.spec_layer_order(small.SPEC, paths, shapes) == order.natural_layer_order(paths, shapes)
    assert order.spec_layer_order(small.SPEC, paths[1:], shapes[1:]) == [0, 2, 1]  # the first bias is missing
