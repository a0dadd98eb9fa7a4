"""Permuted networks in: equal logits and permuted edits out, to float precision, before and after training."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ngjax
from ngjax.nn import EncoderConfig, GraphReadout, ParamsReadout, WeightSpaceModel, weight_statistics
from ngjax.zoo.siren import init_siren
from tests.nn.small import BACKBONES, ENCODER, TwoHeads, error, jit, leaf_errors, one, siren_spec, sirens, variables_of

TOLERANCE = 1e-5  # of the scale of what is compared, in float32
BUDGET = ngjax.GraphBudget(3, 84, 420, 40)
PROBED = EncoderConfig(**{**vars(ENCODER), "num_probes": 3})


def permuted(spec, network, seed):
    """Another order of the hidden neurons, and what puts a network into that order."""
    rng = np.random.default_rng(seed)
    perms = {a.id: rng.permutation(a.size) for a in spec.actions if a.kind == "permutation"}
    move = functools.partial(_permute, [perms.get(g.axis) for g in spec.node_groups])
    return move(network), move


def _permute(perms, network):
    """By hand, so that the library is not compared with itself."""
    result = {}
    for i in range(len(network)):
        kernel, bias = (np.asarray(network[f"layer_{i}"][name]) for name in ("kernel", "bias"))
        before, after = perms[i], perms[i + 1]
        kernel = kernel if before is None else kernel[before]
        result[f"layer_{i}"] = {
            "kernel": kernel if after is None else kernel[:, after],
            "bias": bias if after is None else bias[after],
        }
    return result


def variance_preserving(sizes, seed):
    rng = np.random.default_rng(seed)
    return {
        f"layer_{i}": {
            "kernel": (rng.standard_normal((n_in, n_out)) * (2 / n_in) ** 0.5).astype(np.float32),
            "bias": (rng.standard_normal(n_out) / 10).astype(np.float32),
        }
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
    }


@functools.cache
def models(kind):
    """A model, its variables, and the program that runs padded batches of all architectures."""
    model = TwoHeads(BACKBONES[kind](encoder=PROBED), GraphReadout(features=3, hidden=8, pooling="mean"))
    return model, variables_of(model, siren_spec((3, 2, 2, 2, 2))), jit(model.apply)


def errors_of(model, variables, spec, networks, move, run_padded=None):
    """Permutation errors of logits and edits on each path, given a network and itself permuted."""
    stacked = jax.tree.map(lambda *x: np.stack(x), *networks)

    @jit
    def blocks(variables, stacked):
        graph = ngjax.to_groups(spec, stacked, feature_axis=False)  # two networks, whatever the widths
        logits, edit = model.apply(variables, graph, spec=spec)
        return logits, ngjax.to_params(spec, edit)

    results = {"blocks": blocks(variables, stacked)}
    if run_padded is not None:
        graphs = [ngjax.to_graph(spec, network) for network in networks]
        logits, edit = run_padded(variables, ngjax.batch_graphs(graphs, BUDGET))
        edits = [ngjax.to_params(spec, graph) for graph in ngjax.unbatch_graphs(edit, graphs)]
        results["padded"] = (logits[:2], jax.tree.map(lambda *x: np.stack(x), *edits))
    errors = {}
    for path, (logits, edits) in results.items():
        errors[path, "logits"] = error(logits[1:], logits[:1])
        errors[path, "edits"] = error(one(edits, 1), move(one(edits, 0)))
    return errors


@pytest.mark.parametrize("kind", BACKBONES)
def test_random_architectures(kind):
    model, variables, run_padded = models(kind)

    @settings(max_examples=2)
    @given(
        sizes=st.tuples(st.integers(1, 3), st.lists(st.integers(1, 8), min_size=0, max_size=3), st.integers(1, 2)).map(
            lambda s: (s[0], *s[1], s[2])
        ),
        seed=st.integers(0, 2**16),
        activation=st.sampled_from(["siren", "relu"]),
    )
    def check(sizes, seed, activation):
        spec = ngjax.mlp_spec(sizes, activation=activation)
        network = one(sirens(sizes, 1, seed=seed), 0) if activation == "siren" else variance_preserving(sizes, seed)
        other, move = permuted(spec, network, seed)
        errors = errors_of(model, variables, spec, [network, other], move, run_padded)
        assert max(errors.values()) < TOLERANCE, errors

    check()


def test_the_check_has_teeth():
    """The bias read-out of the reference editor is not equivariant, and the same check says so."""
    spec = siren_spec((2, 6, 5, 1))
    network = one(sirens((2, 6, 5, 1), 1), 0)
    other, move = permuted(spec, network, 1)
    for alignment in ("corrected", "reference"):
        model = TwoHeads(BACKBONES["ng-gnn"](), GraphReadout(features=3), ParamsReadout(bias_alignment=alignment))
        errors = errors_of(model, variables_of(model, spec), spec, [network, other], move)
        assert errors["blocks", "logits"] < TOLERANCE
        assert (errors["blocks", "edits"] < TOLERANCE) == (alignment == "corrected"), errors
        assert alignment == "corrected" or errors["blocks", "edits"] > 1e-2


IDENTITY_SIZES = (2, 6, 1)


@pytest.fixture(scope="module", params=BACKBONES)
def identity(request):
    """An editor trained to return the weights that it reads, new random ones in each step."""
    spec = siren_spec(IDENTITY_SIZES)
    statistics = weight_statistics(spec, sirens(IDENTITY_SIZES, 512, seed=5))
    encoder = EncoderConfig(**{**vars(ENCODER), "statistics": statistics})
    sizes = (
        {"features": 24}
        if request.param == "ng-gnn"
        else {
            "node_features": 24,
            "edge_features": 24,
            "attention_features": 8,
            "node_hidden": 24,
            "edge_hidden": 24,
        }
    )
    model = WeightSpaceModel(
        BACKBONES[request.param](encoder=encoder, **sizes), ParamsReadout(statistics=statistics, output_scale=None)
    )
    shapes = ngjax.to_groups(spec, sirens(IDENTITY_SIZES, 1))
    variables = jax.jit(lambda key: model.init(key, shapes, spec=spec))(jax.random.key(0))
    # Of one vector, which takes less compiling than a program for every leaf.
    optimizer = optax.flatten(optax.adam(optax.cosine_decay_schedule(5e-3, STEPS)))
    deviation = {f"layer_{i}": {"kernel": statistics.weight_std[i], "bias": statistics.bias_std[i]} for i in range(2)}

    def loss(variables, params):
        result = ngjax.to_params(spec, model.apply(variables, ngjax.to_groups(spec, params), spec=spec))
        return sum(
            jnp.mean(((a - b) / s) ** 2)
            for a, b, s in zip(*(jax.tree.leaves(t) for t in (result, params, deviation)), strict=True)
        )

    def step(carry, key):
        variables, state = carry
        params = jax.vmap(lambda k: init_siren(k, IDENTITY_SIZES))(jax.random.split(key, 16))
        value, gradients = jax.value_and_grad(loss)(variables, params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(variables, updates), state), value

    @jax.jit
    def train(variables, keys):
        return jax.lax.scan(step, (variables, optimizer.init(variables)), keys)

    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        (trained, _), values = train(variables, jax.random.split(jax.random.key(1), STEPS))

    @jit
    def edit(params):
        return ngjax.to_params(spec, model.apply(trained, ngjax.to_groups(spec, params), spec=spec))

    return edit, np.asarray(values)


STEPS = 250


def test_an_editor_learns_the_identity(identity):
    """Every leaf, biases too: R^2 on networks it has not seen."""
    edit, _ = identity
    params = sirens(IDENTITY_SIZES, 64, seed=99)
    result = edit(params)
    unexplained = jax.tree.map(lambda a, b: np.mean((np.asarray(a) - b) ** 2) / np.var(b), result, params)
    assert max(jax.tree.leaves(unexplained)) < 0.01, unexplained


def test_a_trained_editor_is_equivariant(identity):
    edit, losses = identity
    assert losses[-1] < losses[0] / 10, "it was trained"
    spec = siren_spec(IDENTITY_SIZES)
    network = one(sirens(IDENTITY_SIZES, 1, seed=3), 0)
    other, move = permuted(spec, network, 2)
    stacked = jax.tree.map(lambda *x: np.stack(x * 32), network, other)  # 64 networks: the program is compiled
    edits = edit(stacked)
    worst = leaf_errors(one(edits, 1), move(one(edits, 0)))
    assert max(worst.values()) < TOLERANCE, worst
