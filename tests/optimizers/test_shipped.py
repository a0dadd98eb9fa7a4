"""The meta-parameters that come with the package."""

import importlib.resources

import jax
import numpy as np
import optax
import pytest

from ngjax.optimizers import init_meta_params, ng_learned_opt, shipped
from tests.optimizers.small import GRADIENTS, PARAMS, assert_close, run


def test_the_package_has_weights_with_cards():
    default = {f"{rule}-normalized" for rule in ("ng-gnn", "ng-t", "ff", "lstm", "celo2")}
    paper = {f"{rule}-paper" for rule in ("ng-gnn", "ng-t", "nfn", "ff", "lstm")}
    assert set(shipped.shipped_names()) == default | paper
    folder = importlib.resources.files("ngjax.optimizers") / "weights"
    files = {file.name: len(file.read_bytes()) for file in folder.iterdir()}
    assert set(files) == {f"{name}.{end}" for name in default | paper for end in ("safetensors", "md")}
    assert sum(files.values()) < 8e6


@pytest.mark.parametrize("name", shipped.shipped_names())
def test_shipped_meta_parameters_are_those_of_their_rule(name):
    rule, _, step = name.rpartition("-")
    theta = shipped.shipped_meta_params(rule, step)
    fresh = init_meta_params(jax.random.key(0), rule, step)
    assert_close(jax.tree.map(np.zeros_like, theta), jax.tree.map(np.zeros_like, fresh))
    found = run(ng_learned_opt(rule, step=step), PARAMS, GRADIENTS)[0]
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf != 0) for leaf in jax.tree.leaves(found))


def test_shipped_meta_parameters_may_first_be_read_under_a_trace():
    shipped.shipped_meta_params.cache_clear()
    optimizer = optax.inject_hyperparams(ng_learned_opt)("ff", learning_rate=0.02)
    state = jax.jit(optimizer.init)(PARAMS)
    for _ in range(2):
        found, state = jax.jit(optimizer.update)(GRADIENTS[0], state, PARAMS)
    expected = run(ng_learned_opt("ff", learning_rate=0.02), PARAMS, 2 * GRADIENTS[:1])[0]
    assert_close(found, jax.tree.map(lambda leaf: leaf[1], expected))


def test_rules_without_shipped_weights_name_those_that_have_them():
    with pytest.raises(ValueError, match="no weights are shipped for rule='nfn' with step='normalized'; there are"):
        ng_learned_opt("nfn")
