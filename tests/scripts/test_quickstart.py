"""The main job, end to end on a few digits."""

import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from matplotlib import image

import ngjax
from ngjax import zoo

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # where dataclasses look up the annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quickstart"]


@pytest.fixture(scope="module")
def run(quickstart, tmp_path_factory):
    """A run on 100 digits, small enough for seconds, and its output folder."""
    out = tmp_path_factory.mktemp("quickstart") / "new" / "folder"
    config = quickstart.Config(
        out=out,
        num_images=100,
        fits_per_image=2,
        fit_steps=60,
        probes=4,
        features=4,
        layers=1,
        graph_epochs=1,
        epochs=8,
    )
    return quickstart.main(config), out


def test_results_are_complete(run):
    results, out = run
    assert json.loads((out / "results.json").read_text()) == results
    for model in ("ng_gnn", "ng_gnn_no_probe", "probe_only", "mlp", "mlp_shared_init"):
        for number in ("test_accuracy", "shuffled_test_accuracy", "changed_predictions"):
            assert 0 <= results[f"{model}_{number}"] <= 1
    assert results["train_networks"] == 160
    assert results["test_networks"] == 40
    assert results["config"]["seed"] == 1
    assert len(results["table"]) == 7
    parts = dict(results["seconds"])
    assert parts.pop("total") >= sum(parts.values()) - 0.5, "stages are parts of the whole, rounded"
    assert len(parts) == 7


def test_graph_networks_and_probes_do_not_see_the_order_of_neurons(run):
    results, _ = run
    for model in ("ng_gnn", "ng_gnn_no_probe", "probe_only"):
        assert results[f"{model}_largest_logit_change"] < 1e-4 * results[f"{model}_largest_logit"]
        assert results[f"{model}_shuffled_test_accuracy"] == pytest.approx(results[f"{model}_test_accuracy"], abs=0.03)


def test_the_mlp_does(run):
    results, _ = run
    for model in ("mlp", "mlp_shared_init"):
        assert results[f"{model}_largest_logit_change"] > 0.3 * results[f"{model}_largest_logit"]
        assert results[f"{model}_changed_predictions"] > 0.5
    # It reads networks that were fitted from one start, until their neurons are shuffled.
    assert results["mlp_shared_init_test_accuracy"] > 0.6
    assert results["mlp_shared_init_shuffled_test_accuracy"] < 0.4


def test_pictures_are_there_and_nothing_half_written_is(run):
    _, out = run
    names = {path.name for path in out.iterdir()}
    assert names == {"results.json", "digits.png", "learning_curves.png", "neural_graph.png"}
    for name in names - {"results.json"}:
        pixels = image.imread(out / name)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.05  # not blank


def test_no_network_of_a_test_image_is_trained_on(quickstart):
    labels = np.arange(20) % 2
    split = zoo.stratified_split(labels, test_fraction=0.2, seed=0)
    # Every weight of a network is the number of its image.
    params = {"kernel": np.broadcast_to(np.arange(20)[:, None, None], (20, 3, 5))}
    networks = quickstart.split_networks(params, labels, split)
    assert networks.train.params["kernel"].shape == (48, 5)
    assert networks.test.params["kernel"].shape == (12, 5)
    trained, tested = (set(part.params["kernel"].ravel().tolist()) for part in networks[:2])
    assert trained.isdisjoint(tested)
    for part in networks[:2]:
        np.testing.assert_array_equal(part.labels, part.params["kernel"][:, 0] % 2)


def test_shuffled_networks_draw_the_same(quickstart):
    params = jax.vmap(lambda key: zoo.init_siren(key, quickstart.SIZES))(jax.random.split(jax.random.key(0), 4))
    shuffled = quickstart.shuffle_neurons(params, jax.random.key(1))
    assert not np.allclose(shuffled["layer_1"]["kernel"], params["layer_1"]["kernel"])
    # Each in an order of its own.
    order = [np.argsort(of["layer_0"]["bias"], axis=-1) for of in (params, shuffled)]
    moves = np.take_along_axis(np.argsort(order[1], axis=-1), order[0], axis=-1)
    assert len({tuple(move) for move in moves.tolist()}) == 4
    render = jax.jit(jax.vmap(functools.partial(zoo.render, height=4, width=4)))
    np.testing.assert_allclose(render(shuffled), render(params), atol=2e-5)


def test_an_unwritable_folder_fails_before_any_work(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    command = [sys.executable, str(SCRIPT), "--out", str(blocked / "out")]
    environment = {"PYTHONPATH": str(pathlib.Path(ngjax.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode != 0
    assert str(blocked / "out") in result.stderr.splitlines()[-1]
    assert "digits" not in result.stdout


def test_a_file_appears_only_when_it_is_complete(quickstart, tmp_path):
    def write_and_fail():
        with quickstart.write_atomically(tmp_path / "results.json") as path:
            path.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []
