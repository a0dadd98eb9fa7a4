"""A small optimizee, small rules, and a few steps with them."""

import functools

import jax
import numpy as np

import ngjax
from ngjax.optimizers import CoordinatewiseLSTMRule, FFRule, LSTMRule, init_meta_params, ng_learned_opt
from ngjax.optimizers.features import NORMALIZED_FEATURES
from ngjax.optimizers.named_rules import celo2_rule, nfn_rule, ng_gnn_rule, ng_t_rule

RULES = {
    "ff": FFRule(width=8, num_hidden=1),
    "lstm": LSTMRule(width=8),
    "ng-gnn": ng_gnn_rule(8, num_layers=1, num_hidden=1, reads=NORMALIZED_FEATURES),
    "ng-t": ng_t_rule(8, num_layers=1, num_hidden=1),
    "nfn": nfn_rule(8, num_layers=1, num_hidden=1),
    "celo2": celo2_rule(width=8),
    "coordinatewise-lstm": CoordinatewiseLSTMRule(width=8),
}
SIZES = (4, 8, 2)
SPEC = ngjax.mlp_spec(SIZES)


def drawn_meta_params(rule, seed=7):
    """Fresh ones, but for the last layer, which would be zero."""
    theta = jax.device_get(init_meta_params(jax.random.key(seed), rule))
    rng, last = np.random.default_rng(seed), f"dense_{rule.num_hidden}"
    width = len(theta["head"][last]["kernel"])
    draw = {k: np.float32(rng.uniform(-1, 1, v.shape) / width**0.5) for k, v in theta["head"][last].items()}
    return {**theta, "head": {**theta["head"], last: draw}}


@functools.cache
def meta_params(name):
    return drawn_meta_params(RULES[name])


@functools.cache
def learned_opt(name):
    return ng_learned_opt(RULES[name], meta_params=meta_params(name))


def normal(seed, scale=1.0):
    """Weights of an MLP, or gradients of them, drawn from a normal distribution."""
    rng = np.random.default_rng(seed)
    return {
        f"layer_{i}": {
            name: np.asarray(scale * rng.standard_normal(shape), np.float32)
            for name, shape in (("kernel", SIZES[i : i + 2]), ("bias", SIZES[i + 1 : i + 2]))
        }
        for i in range(len(SIZES) - 1)
    }


PARAMS = normal(0)
GRADIENTS = [normal(1 + t) for t in range(3)]


def run(optimizer, params, gradients):
    """The updates of one step after the other at the same parameters, stacked, and the last state."""
    return jax.device_get(scan_steps(optimizer, params, stacked(gradients)))


# Compiled once for each optimizer, of which those above are always the same. Trees are of numpy arrays outside of it:
# every operation of JAX's would be compiled on its own.
@functools.partial(jax.jit, static_argnums=0)
def scan_steps(optimizer, params, gradients):
    def step(state, gradient):
        update, state = optimizer.update(gradient, state, params)
        return state, update

    state, updates = jax.lax.scan(step, optimizer.init(params), gradients)
    return updates, state


def updates(name="ff", gradients=GRADIENTS, **options):
    """Of `PARAMS`, by one of `RULES`."""
    return run(ng_learned_opt(RULES[name], meta_params=meta_params(name), **options), PARAMS, gradients)[0]


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def assert_close(ours, expected, tolerance=1e-5):
    """Leaves agree relative to the greatest entry of each."""

    def check(path, a, b):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert a.shape == b.shape
        error, scale = np.max(np.abs(a - b), initial=0), np.max(np.abs(b), initial=0)
        assert error <= tolerance * scale, f"{jax.tree_util.keystr(path)}: error {error:.1e}, scale {scale:.1e}"

    jax.tree.map_with_path(check, ours, expected)
