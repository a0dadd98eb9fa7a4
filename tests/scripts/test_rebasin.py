"""The script end to end, with small networks on few images."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
from matplotlib import image

import ngjax

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "rebasin.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("rebasin", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["rebasin"] = module  # where dataclasses look up the annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["rebasin"]


def config(script, out, **changes):
    small = {
        "line_images": 360,
        "images": "digits",
        "width": 24,
        "depth": 2,
        "epochs": 5,
        "batch_size": 60,
        "points": 5,
        "seeds": (3,),
    }
    return script.Config(out=out, **{**small, **changes})


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("rebasin") / "new" / "folder"
    return script.main(config(script, out)), out


def test_results_are_complete(run):
    results, out = run
    assert json.loads((out / "results.json").read_text()) == results
    assert sorted(path.name for path in out.iterdir()) == ["barrier.png", "results.json"]
    assert image.imread(out / "barrier.png").shape[2] == 4
    assert [of["seed"] for of in results["seeds"]] == [3]
    assert results["num_params"] == 64 * 24 + 24 + 24 * 24 + 24 + 24 * 10 + 10
    assert len(results["table"]) == 5
    assert results["deviation"]["matched"]["test_barrier"] is None
    assert results["config"]["model"] == "mlp"
    assert {"machine", "versions", "date"} <= set(results)


def test_networks_learn_and_keep_their_function_in_any_order(run):
    results, _ = run
    assert results["test_accuracy"] > 0.7
    for of in results["seeds"]:
        for number in ("test_loss", "train_loss", "test_accuracy"):
            lines = np.array([of["lines"][name][number] for name in ("as_trained", "random", "matched")])
            assert lines.shape == (3, 5)
            np.testing.assert_allclose(lines[:, [0, -1]], np.tile(lines[:1, [0, -1]], (3, 1)), rtol=1e-4)
        assert of["lines"]["as_trained"]["test_loss"][0] != of["lines"]["as_trained"]["test_loss"][-1]


def test_matching_lowers_the_barrier_and_a_random_order_does_not(run):
    results, _ = run
    mean = results["mean"]
    for number in ("test_barrier", "train_barrier"):
        assert mean["matched"][number] < 0.5 * min(mean["as_trained"][number], mean["random"][number])
    assert mean["as_trained"]["relative_distance"] == 1
    assert mean["matched"]["relative_distance"] < 0.97 < mean["random"]["relative_distance"]


def test_the_barrier_is_the_height_above_the_straight_line(script):
    assert script.barrier([1.0, 4.0, 3.0]) == 2.0  # 4 above the mean of 1 and 3
    assert script.barrier([1.0, 1.0, 3.0, 4.0]) == 0.0  # never above it
    assert script.barrier([1.0, 3.0, 3.5, 4.0]) == 1.0
    assert script.barrier([1.0, 0.5, 1.0]) == 0.0


def test_several_seeds_have_a_mean_and_a_deviation(script, run, tmp_path):
    results, _ = run
    lines = {name: script.Line(**line) for name, line in results["seeds"][0]["lines"].items()}
    other = lines | {"matched": lines["matched"]._replace(test_loss=[0.1, 0.1, 0.3, 0.1, 0.1])}
    outcomes = [script.Outcome(seed, of, 1.0, 1.0) for seed, of in enumerate((other, other, lines))]
    several = script.summarize(config(script, tmp_path), ngjax.mlp_spec((64, 24, 24, 10)), outcomes)
    values = [0.2, 0.2, results["mean"]["matched"]["test_barrier"]]
    assert several["mean"]["matched"]["test_barrier"] == pytest.approx(np.mean(values))
    assert several["deviation"]["matched"]["test_barrier"] == pytest.approx(np.std(values, ddof=1))
    assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in several["table"][4]
    script.save_figure(script.draw_lines(config(script, tmp_path), outcomes), tmp_path / "barrier.png")
    assert image.imread(tmp_path / "barrier.png").shape[2] == 4


def test_convolutions(script, tmp_path):
    results = script.main(
        config(script, tmp_path, model="cnn", width=4, epochs=0.2, points=3, seeds=(0,), num_images=200)
    )
    assert results["num_params"] == 3 * 3 * 4 + 4 + 3 * 3 * 4 * 8 + 8 + 8 * 10 + 10
    assert (tmp_path / "barrier.png").exists()


def test_settings_that_cannot_be_are_refused(script, tmp_path):
    with pytest.raises(ValueError, match=r"points=2.*at least 3 points"):
        script.main(config(script, tmp_path / "out", points=2))
    assert not (tmp_path / "out").exists()
