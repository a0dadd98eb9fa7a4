"""Every architecture of the README's table, narrow: what the trace finds is what was written down by hand."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from scripts.architectures import ARCHITECTURES
from tests.trace.test_networks import free_groups

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def generic(abstract, rng):
    """Parameters from their shapes alone: no zeros and ones, which hide errors, and vectors positive, as variances are.

    Drawn by numpy: compiling initializers would take longer than all the rest.
    """

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        if leaf.size == max(leaf.shape, default=1):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        return rng.normal(scale=leaf.size**-0.25, size=leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, abstract)


def random_permutations(spec, rng):
    """As those of ngjax, which are compiled for every spec."""

    def draw(action):
        shape = (*(spec.action[id].size for id in action.per), action.size)
        return rng.permuted(np.broadcast_to(np.arange(action.size, dtype=np.int32), shape), axis=-1)

    return {action.id: draw(action) for action in spec.actions if action.kind == "permutation"}


def test_names_differ():
    assert len(BY_NAME) == len(ARCHITECTURES) >= 25


@pytest.mark.parametrize("name", BY_NAME)
def test_architecture(name):
    architecture = BY_NAME[name]
    network = architecture.narrow()
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    spec = ngjax.trace_spec(network.apply, abstract, *network.inputs)
    expected = collections.Counter(architecture.free) - collections.Counter(architecture.missed)
    assert collections.Counter(free_groups(spec)) == expected + collections.Counter(architecture.tied)
    assert spec.num_loose == architecture.loose
    reasons = {place: pinned.reason.split(", ") for pinned in spec.pinned for place in pinned.axes}
    for path, axis, reason in architecture.pinned:
        assert reason in reasons.get((path, axis), []), (path, axis)

    rng = np.random.default_rng(2)
    params, perms = generic(abstract, rng), random_permutations(spec, rng)

    @jax.jit
    def moved_and_back(params):
        back = ngjax.to_params(spec, ngjax.to_groups(spec, params), like=params)
        return ngjax.permute_params(spec, perms, params), back

    moved, back = moved_and_back(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True))
    run = jax.jit(network.apply)
    before, after = (jax.tree.leaves(run(p, *network.inputs)) for p in (params, moved))
    # sin(30 x) makes much of rounding
    tolerance = 1e-4 if name.startswith("SIREN") else 1e-5
    for a, b in zip(map(np.asarray, before), map(np.asarray, after), strict=True):
        scale = np.max(np.abs(a))
        assert math.isfinite(scale)
        assert scale > 0
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * scale)
