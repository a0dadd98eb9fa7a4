import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngjax.optimizers import CoordinatewiseLSTMRule, GraphRule, heads, init_meta_params, ng_learned_opt, rules, steps
from ngjax.optimizers.named_rules import computing
from ngjax.optimizers.parts import list_spec
from tests.optimizers.small import RULES, SPEC, assert_close, learned_opt, meta_params, normal, run


@pytest.mark.parametrize(
    ("rule", "step", "num_scalars"),
    [
        ("ff", "paper", 5250),
        ("lstm", "paper", 11554 - 4 * 32),  # the paper's cell has two biases, of which only the sum matters
        ("coordinatewise-lstm", "normalized", (17 + 16 + 1) * 4 * 16 + (17 + 16 + 1) * 16 + 17 * 2),
        ("celo2", "normalized", 398),  # the published one has 347
        ("ng-gnn", "normalized", 31730),
        ("ng-gnn", "paper", 705794),
        ("ng-t", "normalized", 20354),
        ("ng-t", "paper", 67842),
        ("nfn", "normalized", 17698),
        ("nfn", "paper", 76418),
    ],
)
def test_sizes(rule, step, num_scalars):
    shapes = jax.eval_shape(lambda key: init_meta_params(key, rule, step), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == num_scalars


def test_fresh_meta_params_are_within_the_bound_of_their_inputs():
    theta = meta_params("lstm")
    bounds = {"summary_0": 14, "summary_1": 8, "input_kernel": 8, "hidden_kernel": 8, "bias": 8}
    for name, inputs in bounds.items():
        greatest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(theta[name]))
        assert 0.7 / np.sqrt(inputs) < greatest <= 1 / np.sqrt(inputs)


def test_head_is_a_perceptron_on_features_and_backbone():
    features = jax.random.normal(jax.random.key(0), (4, 3, 14))
    backbone = jax.random.normal(jax.random.key(1), (3, 5))  # one for each of the last axis
    head = heads.UpdateHead(width=6, num_hidden=2)
    theta = head.init(jax.random.key(2), features, backbone)
    joined = jnp.concatenate([features, jnp.broadcast_to(backbone, (4, 3, 5))], axis=-1)
    expected = joined
    for i, layer in enumerate(theta["params"][f"dense_{i}"] for i in range(3)):
        expected = expected @ layer["kernel"] + layer["bias"]
        expected = expected if i == 2 else jax.nn.relu(expected)
    np.testing.assert_allclose(head.apply(theta, features, backbone), expected, rtol=1e-4, atol=1e-6)


def test_lstm_is_that_of_flax():
    inputs = jax.random.normal(jax.random.key(0), (5, 4))
    cell = nn.OptimizedLSTMCell(3)
    carry = cell.initialize_carry(jax.random.key(1), (4,))
    theta = cell.init(jax.random.key(2), carry, inputs[0])["params"]
    expected = []
    for x in inputs:
        carry, hidden = cell.apply({"params": theta}, carry, x)
        expected.append(hidden)
    ours = rules.LSTMCell(
        jnp.concatenate([theta[f"i{gate}"]["kernel"] for gate in "ifgo"], axis=1),
        jnp.concatenate([theta[f"h{gate}"]["kernel"] for gate in "ifgo"], axis=1),
        jnp.concatenate([theta[f"h{gate}"]["bias"] for gate in "ifgo"]),
    )
    np.testing.assert_allclose(rules.lstm_over(ours, inputs), jnp.stack(expected), rtol=1e-5, atol=1e-6)


def test_coordinatewise_lstm_is_that_of_flax_for_every_scalar():
    rule = RULES["coordinatewise-lstm"]
    features = jax.random.normal(jax.random.key(0), (3, 2, rule.reads.size))
    carry = tuple(jax.random.normal(jax.random.key(seed), (3, 2, 8)) for seed in (1, 2))  # Flax: memory, hidden
    cell = nn.OptimizedLSTMCell(8)
    theta = cell.init(jax.random.key(3), carry, features)["params"]
    (memory, hidden), _ = cell.apply({"params": theta}, carry, features)
    kernels = [jnp.concatenate([theta[f"{part}{gate}"]["kernel"] for gate in "ifgo"], axis=1) for part in "ih"]
    bias = jnp.concatenate([theta[f"h{gate}"]["bias"] for gate in "ifgo"])
    ours = {**meta_params("coordinatewise-lstm"), "input_kernel": kernels[0], "hidden_kernel": kernels[1], "bias": bias}
    for chunk in (None, 2):
        (head,), (state,) = rule.clone(chunk=chunk).apply(
            {"params": ours}, [features], [jnp.concatenate([carry[1], carry[0]], axis=-1)]
        )
        np.testing.assert_allclose(state, jnp.concatenate([hidden, memory], axis=-1), rtol=1e-4, atol=1e-6)
        expected = heads.UpdateHead(8, 1).apply({"params": ours["head"]}, features, hidden)
        np.testing.assert_allclose(head, expected, rtol=1e-4, atol=1e-6)


def test_coordinatewise_lstm_carries_its_state_from_step_to_step():
    optimizer, params, gradient = learned_opt("coordinatewise-lstm"), normal(0), normal(1)
    state = optimizer.init(params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(state.carry))
    other = jax.device_get(jax.jit(optimizer.update)(normal(2), state, params)[1])
    update = jax.jit(optimizer.update)
    fresh, carried = (update(gradient, state._replace(carry=carry), params)[0] for carry in (state.carry, other.carry))
    assert all(np.all(np.abs(a - b) > 0) for a, b in zip(*map(jax.tree.leaves, (fresh, carried)), strict=True))


def test_the_state_of_another_rule_is_refused():
    params = normal(0)
    for one, other in (("ff", "coordinatewise-lstm"), ("coordinatewise-lstm", "ff")):
        with pytest.raises(ValueError, match=r"state: its carry is not one that init of this \w+ returned"):
            learned_opt(one).update(params, learned_opt(other).init(params), params)
    narrow = CoordinatewiseLSTMRule(width=4)
    state = ng_learned_opt(narrow, meta_params=init_meta_params(jax.random.key(0), narrow)).init(params)
    with pytest.raises(ValueError, match="state: its carry is not one that init of this CoordinatewiseLSTMRule"):
        learned_opt("coordinatewise-lstm").update(params, state, params)


@pytest.mark.parametrize("name", RULES)
def test_meta_gradients_are_finite(name):
    rng = np.random.default_rng(1)
    paths, shapes = zip(*((param.path, param.shape) for param in SPEC.params), strict=True)
    network, *others = (
        tuple(rng.standard_normal((*shape, RULES[name].reads.size), np.float32) for shape in shapes)
        for shapes in (shapes, ((4, 3), (0,), (2,)))
    )

    @jax.jit
    @jax.grad
    def gradient(theta, network, others):
        rest = ((), ())  # what the rule reads beside features
        if isinstance(RULES[name], GraphRule):
            rest = ((list_spec(SPEC, paths, shapes),), (None,))
        if name == "coordinatewise-lstm":
            rest = [([f[..., :16] for f in features],) for features in (network, others)]
        results = [RULES[name].apply({"params": theta}, f, *r) for f, r in zip((network, others), rest, strict=True)]
        if name == "coordinatewise-lstm":
            results = [heads for heads, _ in results]
        return sum(jnp.sum(steps.paper_step(head)) for result in results for head in result)

    gradients = gradient(meta_params(name), network, *others)
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))


def test_celo2_does_not_see_the_scale_of_the_loss():
    params, gradients = normal(0), [normal(1), normal(2)]
    expected = run(learned_opt("celo2"), params, gradients)[0]
    for scale in (1e-12, 1e12):
        scaled = jax.tree.map(lambda leaf, s=scale: np.float32(s) * leaf, gradients)
        assert_close(run(learned_opt("celo2"), params, scaled)[0], expected, tolerance=1e-4)


def test_a_deep_head_tells_scalars_apart_from_the_start():
    head = heads.UpdateHead(64, 8)
    features = jax.random.normal(jax.random.key(0), (500, 14))
    params = jax.jit(head.init)(jax.random.key(1), features)["params"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(params["dense_8"]))
    params["dense_8"] = {"kernel": np.ones((64, 2), np.float32), "bias": np.zeros(2, np.float32)}
    total = head.apply({"params": params}, features)[:, 0]  # of the last hidden layer
    assert np.std(total) / np.abs(np.mean(total)) > 0.2
    assert np.std(total) > 1  # without biases, what has all but vanished still varies


@pytest.mark.parametrize("name", ["ng-gnn", "ng-t", "nfn"])
def test_backbones_compute_in_the_dtype_too(name):
    rule = computing(RULES[name], jnp.bfloat16, 5)
    assert (rule.dtype, rule.backbone.dtype, rule.chunk) == (jnp.bfloat16, jnp.bfloat16, 5)


def test_the_recurrence_is_in_float32(monkeypatch):
    seen, over = [], rules.lstm_over
    monkeypatch.setattr(rules, "lstm_over", lambda cell, x: seen.append((cell.bias.dtype, x.dtype)) or over(cell, x))
    RULES["lstm"].clone(dtype=jnp.bfloat16).apply({"params": meta_params("lstm")}, [jnp.ones((3, 14))])
    assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"))}
