"""Agreement with outputs and gradients recorded from the PyTorch implementation of the paper.

One small case lives in `tests/data`; the others are read from the folder in `NGJAX_PARITY_DIR`.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngjax import convert
from ngjax.optimizers import GraphRule
from ngjax.optimizers import features as scalar_features
from ngjax.optimizers.order import natural_layer_order
from ngjax.optimizers.parts import inferred_spec
from ngjax.spec import PathKey

CASES = (
    "ng_gnn_inr_mean_all",
    "ng_gnn_inr_forward_edges",
    "ng_gnn_inr_reverse_probe",
    "ng_t_inr_forward_edges",
    "ng_t_inr_reverse_probe",
    "ng_t_inr_class_token",
    "ng_gnn_edit",
    "ng_t_edit",
    "ng_t_edit_denormalised",
    "siren_render",
)
OPTIMIZERS = (
    "metaopt_ff",
    "metaopt_lstm",
    "metaopt_ng_gnn",
    "metaopt_ng_gnn_corrected",
    "metaopt_ng_t",
    "metaopt_ng_t_corrected",
)
FORWARD, GRADIENT = 1e-5, 1e-4
LATER_STEPS = 3e-5  # of an optimizer: the preprocessing amplifies what rounding did to momenta near zero


def load(name, request):
    path = pathlib.Path(__file__).parent / "data" / f"{name}.npz"
    if not path.exists():
        path = request.getfixturevalue("parity_dir") / f"{name}.npz"
    with np.load(path) as file:
        case = {key: file[key] for key in file.files}
    return json.loads(str(case["config"])), case


def listed(case, prefix):
    """Arrays `prefix/0`, `prefix/1`, ... as a list."""
    return [jnp.asarray(case[f"{prefix}/{i}"]) for i in range(sum(key.startswith(f"{prefix}/") for key in case))]


def loss_of(config, case, result):
    if config["model"] == "siren_render":
        return jnp.mean((result - case["in/target"]) ** 2)
    if config["model"].endswith("editor"):
        weights, biases = result
        pairs = [(weights, "in/cotangent/weights"), (biases, "in/cotangent/biases")]
        return sum(jnp.sum(d * c) for deltas, key in pairs for d, c in zip(deltas, listed(case, key), strict=True))
    log_probabilities = jax.nn.log_softmax(result)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, case["in/labels"][:, None], axis=1))


def assert_close(ours, recorded, tolerance, what):
    recorded = np.asarray(recorded)
    assert np.shape(ours) == recorded.shape, what
    error, scale = np.max(np.abs(np.asarray(ours) - recorded)), np.max(np.abs(recorded))
    assert error <= tolerance * scale, f"{what}: error {error:.1e}, scale {scale:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, request):
    config, case = load(name, request)
    state = {key: value for key, value in case.items() if key.startswith("param/")}
    inputs = listed(case, "in/weights"), listed(case, "in/biases")

    # The case that every clone has is compiled as users compile it, the others in half the time.
    options = {} if name == "ng_gnn_inr_mean_all" else {"xla_backend_optimization_level": 0}

    @functools.partial(jax.jit, compiler_options=options)
    def run(state, inputs):
        def loss(state, inputs):
            result = convert.from_reference(config, state)(*inputs)
            return loss_of(config, case, result), result

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, inputs)

    (loss, result), (by_state, by_inputs) = run(state, inputs)
    assert_close(loss, case["out/loss"], FORWARD, "loss")
    if config["model"] == "siren_render":
        assert_close(result, case["out/values"], FORWARD, "values")
    elif config["model"].endswith("editor"):
        for kind, deltas in zip(("weights", "biases"), result, strict=True):
            for i, delta in enumerate(deltas):
                assert_close(delta, case[f"out/delta_{kind}/{i}"], FORWARD, f"delta_{kind}/{i}")
    else:
        assert_close(result, case["out/logits"], FORWARD, "logits")
    for kind, gradients in zip(("weights", "biases"), by_inputs, strict=True):
        for i, gradient in enumerate(gradients):
            assert_close(gradient, case[f"grad/{kind}/{i}"], GRADIENT, f"grad/{kind}/{i}")
    recorded = [key for key in case if key.startswith("gradparam/")]
    assert recorded or config["model"] == "siren_render"
    for key in recorded:
        assert_close(by_state[key.replace("gradparam", "param")], case[key], GRADIENT, key)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("ng_gnn_inr")])
def test_repaired_normalization_gives_each_network_alone(name, request):
    config, case = load(name, request)
    run = convert.from_reference(
        config, {k: v for k, v in case.items() if k.startswith("param/")}, repair=("normalization",)
    )
    logits = jax.jit(run)(listed(case, "in/weights"), listed(case, "in/biases"))
    assert_close(logits, case["out/single/logits"], FORWARD, "logits")
    assert np.max(np.abs(case["out/single/logits"] - case["out/logits"])) > 1e-3, "the defect shows in the recording"


def test_repaired_alignment_reads_biases_from_their_own_nodes(request):
    config, case = load("ng_gnn_edit", request)
    run = convert.from_reference(
        config, {k: v for k, v in case.items() if k.startswith("param/")}, repair=["alignment"]
    )
    _, biases = jax.jit(run)(listed(case, "in/weights"), listed(case, "in/biases"))
    for i, delta in enumerate(biases):
        assert_close(delta, case[f"out/corrected/delta_biases/{i}"], FORWARD, f"delta_biases/{i}")


def mean_all(request):
    config, case = load("ng_gnn_inr_mean_all", request)
    return config, {key: value for key, value in case.items() if key.startswith("param/")}


def test_unknown_repair_and_model_are_named(request):
    config, state = mean_all(request)
    with pytest.raises(ValueError, match=r"unknown repair \['colour'\].*alignment"):
        convert.from_reference(config, state, repair=("colour",))
    with pytest.raises(ValueError, match="unknown model 'mlp'.*ng_t_editor"):
        convert.from_reference({**config, "model": "mlp"}, state)


def test_missing_and_left_over_parameters_are_named(request):
    config, state = mean_all(request)
    with pytest.raises(ValueError, match=r"gnn\.convs\.0\.lin\.bias.*missing"):
        convert.from_reference(config, {k: v for k, v in state.items() if k != "param/gnn.convs.0.lin.bias"})
    with pytest.raises(ValueError, match=r"does not have: head\.weight"):
        convert.from_reference(config, state | {"param/head.weight": np.zeros(3)})


def test_names_without_prefix_are_read(request):
    config, case = load("ng_gnn_inr_mean_all", request)
    state = {key.removeprefix("param/"): value for key, value in case.items() if key.startswith("param/")}
    logits = jax.jit(convert.from_reference(config, state))(listed(case, "in/weights"), listed(case, "in/biases"))
    assert_close(logits, case["out/logits"], FORWARD, "logits")


def optimizee(case, prefix, order):
    """The recorded tensors `prefix/<name>`, by name."""
    return {name: jnp.asarray(case[f"{prefix}/{name}"]) for name in order}


def flat(tree, order):
    return jnp.concatenate([tree[name].reshape(-1) for name in order])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_of_learned_optimizers(name, request):
    config, case = load(name, request)
    order = config["parameter_order"]
    state_dict = {key: value for key, value in case.items() if key.startswith("param/")}
    gradients = [optimizee(case, f"in/step{t}/grads", order) for t in range(config["steps"])]

    @jax.jit
    def step(state_dict, gradients, state, params):
        return convert.from_reference(config, state_dict).update(gradients, state, params)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_of_last_step(state_dict, gradients, state, params):
        updates, _ = step(state_dict, gradients, state, params)
        loss = jnp.sum(flat(updates, order) * case["in/cotangent"])
        return loss, loss

    params = optimizee(case, "in/step0/params", order)
    state = convert.from_reference(config, state_dict).init(params)
    for t, gradient in enumerate(gradients):
        if t == config["steps"] - 1:
            by_state, loss = gradient_of_last_step(state_dict, gradient, state, params)
        updates, state = step(state_dict, gradient, state, params)
        tolerance = LATER_STEPS if t else FORWARD
        assert_close(flat(updates, order), case[f"out/step{t}/update"], tolerance, f"update {t}")
        params = optax.apply_updates(params, updates)
        if f"out/step{t + 1}/params/{order[0]}" in case:
            for tensor in order:
                assert_close(params[tensor], case[f"out/step{t + 1}/params/{tensor}"], FORWARD, f"{tensor} {t + 1}")
    momenta = jnp.stack([flat(momentum, order) for momentum in state.momenta], axis=-1)
    assert_close(momenta, case["out/step2/momentum"], FORWARD, "momenta")
    assert_close(loss, case["out/loss"], LATER_STEPS, "loss")
    recorded = [key for key in case if key.startswith("gradparam/")]
    assert recorded
    for key in recorded:
        assert_close(by_state[key.replace("gradparam", "param")], case[key], GRADIENT, key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_features_and_heads_of_learned_optimizers(name, request):
    config, case = load(name, request)
    rule, theta = convert.reference_rule(config, {k: v for k, v in case.items() if k.startswith("param/")})
    params, gradients = (optimizee(case, f"in/step0/{kind}", config["parameter_order"]) for kind in ("params", "grads"))

    @jax.jit
    def run(theta, params, gradients):
        features = [
            scalar_features.scalar_features(params[tensor], gradients[tensor], 5 * [gradients[tensor]])
            for tensor in config["parameter_order"]
        ]
        if not isinstance(rule, GraphRule):
            return features, rule.apply({"params": theta}, features)
        order = config["parameter_order"]
        paths = tuple((PathKey("dict", tensor),) for tensor in order)
        spec = inferred_spec(paths, tuple(params[tensor].shape for tensor in order))
        return features, rule.apply({"params": theta}, features, spec)

    features, outputs = (
        np.concatenate([np.reshape(x, (-1, x.shape[-1])) for x in tensors]) for tensors in run(theta, params, gradients)
    )
    assert_close(features[:256], case["out/step0/head_input_first256"][:, :14], FORWARD, "first features")
    assert_close(features[-64:], case["out/step0/head_input_last64"][:, :14], FORWARD, "last features")
    assert_close(outputs, case["out/step0/head_output"], FORWARD, "head output")


def test_order_of_names_is_the_recorded_one(request):
    config, case = load("metaopt_lstm", request)
    shuffled = sorted(config["parameter_order"])
    shapes = [case[f"in/step0/params/{name}"].shape for name in shuffled]
    order = natural_layer_order([(PathKey("dict", name),) for name in shuffled], shapes)
    assert [shuffled[i] for i in order] == config["parameter_order"] != shuffled


def test_learned_optimizers_of_other_kinds_and_constants_are_refused(request):
    config, case = load("metaopt_ff", request)
    state_dict = {key: value for key, value in case.items() if key.startswith("param/")}
    with pytest.raises(ValueError, match="learned_optimizer_dws' is unknown; known .*learned_optimizer_lstm"):
        convert.from_reference({**config, "model": "learned_optimizer_dws"}, state_dict)
    with pytest.raises(ValueError, match="preprocess_p: this library computes with 10, received 12"):
        convert.from_reference({**config, "preprocess_p": 12}, state_dict)
    with pytest.raises(ValueError, match=r"does not have: fc\.9\.weight"):
        convert.from_reference(config, state_dict | {"param/fc.9.weight": np.zeros(3)})
    with pytest.raises(ValueError, match=r"parameter head is not in the recorded order: conv\.0\.weight"):
        convert.from_reference(config, state_dict).init({"head": jnp.zeros(3)})
