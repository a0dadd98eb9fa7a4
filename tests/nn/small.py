"""Small models and networks for the tests of `ngjax.nn`, and random variables for them without compiling `init`."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import ngjax
from ngjax.nn import NGGNN, NGT, EncoderConfig, GraphReadout, ParamsReadout

ENCODER = EncoderConfig(max_inputs=3, max_hidden_layers=3, max_outputs=2)

# Nothing here is large: half of the time of a test would be LLVM's.
jit = jax.jit


def gnn(**settings) -> NGGNN:
    return NGGNN(**{"features": 8, "num_layers": 2, "encoder": ENCODER} | settings)


def ngt(**settings) -> NGT:
    sizes = {
        "node_features": 8,
        "edge_features": 6,
        "attention_features": 8,
        "node_hidden": 8,
        "edge_hidden": 8,
        "num_layers": 2,
        "num_heads": 2,
        "encoder": ENCODER,
    }
    return NGT(**sizes | settings)


BACKBONES = {"ng-gnn": gnn, "ng-t": ngt}


class TwoHeads(nn.Module):
    """Logits and edits of one backbone, so that one compilation serves both."""

    backbone: nn.Module
    logits: nn.Module = GraphReadout(features=3, hidden=8, pooling="mean")
    edit: nn.Module = ParamsReadout(output_scale=0.1)

    def __call__(self, graph: Any, *, spec: Any = None, train: bool = False) -> Any:
        graph = self.backbone(graph, spec=spec, train=train)
        return self.logits(graph, spec=spec), self.edit(graph, spec=spec)


def variables_of(model, spec, *, seed=0):
    """Random numbers for all variables, biases and scales too, of the size that keeps variance."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ngjax.to_groups(spec, zeros_of(spec)), spec=spec))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if "scale" in name and leaf.ndim < 3:
            return jnp.asarray(1 + noise / 10)
        if name == "kernel" or name == "edge_kernel":
            return jnp.asarray(noise / np.float32(np.sqrt(leaf.shape[-2])))
        return jnp.asarray(noise / 2)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def zeros_of(spec):
    return spec.unflatten([jnp.zeros(p.shape, p.dtype) for p in spec.params])


def siren_spec(sizes):
    return ngjax.mlp_spec(sizes, activation="siren")


def sirens(sizes, count, *, seed=0):
    """Stacked random networks, with the distribution of `ngjax.zoo.siren.init_siren`."""
    rng = np.random.default_rng(seed)

    def uniform(bound, *shape):
        return rng.uniform(-bound, bound, (count, *shape)).astype(np.float32)

    return {
        f"layer_{i}": {
            "kernel": uniform(1 / n_in if i == 0 else (6 / n_in) ** 0.5 / 30, n_in, n_out),
            "bias": uniform(n_in**-0.5, n_out),
        }
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
    }


def one(params, i):
    return jax.tree.map(lambda x: np.asarray(x)[i], params)


def scale_of(*trees):
    return max(float(np.max(np.abs(np.asarray(x, np.float64)))) for tree in trees for x in jax.tree.leaves(tree))


def error(ours, theirs, at_least=0.0):
    """Largest difference of two trees, in units of the largest number of the second (or of `at_least`)."""
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert [np.shape(x) for x in ours] == [np.shape(x) for x in theirs]
    scale = max(scale_of(theirs), at_least)
    assert scale > 0, "nothing to compare"
    worst = max(
        np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)), initial=0)
        for a, b in zip(ours, theirs, strict=True)
    )
    return float(worst) / scale


def leaf_errors(ours, theirs):
    """The error of every leaf in units of that leaf's own scale; the leaves that are all zero must be zero in both."""
    flat = jax.tree_util.tree_flatten_with_path(theirs)[0]
    errors = {}
    for (path, b), a in zip(flat, jax.tree.leaves(ours), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, path
        scale = np.max(np.abs(b), initial=0)
        difference = np.max(np.abs(a - b), initial=0)
        errors[jax.tree_util.keystr(path)] = difference if scale == 0 else difference / scale
    return errors
