"""Agreement with outputs and gradients recorded from the PyTorch implementation of the paper.

One small case lives in `tests/data`; the others are read from the folder in `NGJAX_PARITY_DIR`.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngjax import convert

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
FORWARD, GRADIENT = 1e-5, 1e-4


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
