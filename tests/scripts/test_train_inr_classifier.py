"""The training script, end to end on a few small networks."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from matplotlib import image

import ngjax
from ngjax import train, zoo

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "train_inr_classifier.py"
SIZES = (2, 6, 6, 1)
CLASSES = 3
IMAGES, VIEWS = 60, 2


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_inr_classifier", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_inr_classifier"] = module  # where dataclasses look up the annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_inr_classifier"]


def write_zoo(path, *, sizes=(SIZES,), without=(), validation=True, omega=30.0):
    """Random networks whose biases are larger the higher their class: what anyone can learn in a few steps."""
    count = IMAGES * VIEWS
    images = np.repeat(np.arange(IMAGES), VIEWS)
    labels = {
        "label": (images % CLASSES).astype(np.int32),
        "image": images.astype(np.int32),
        "view": np.tile(np.arange(VIEWS), IMAGES).astype(np.int32),
        "split": np.where(images < 36, 0, np.where(images < 48, int(validation), 2)).astype(np.int32),
    }
    labels = {name: column for name, column in labels.items() if name not in without}
    categories = {} if "split" in without else {"split": ("train", "validation", "test")}
    metadata = {"omega": omega, "output_offset": 0.5}
    rng = np.random.default_rng(0)
    with zoo.ZooWriter(path, metadata=metadata, categories=categories, provenance={"made_by": "test"}) as writer:
        for number, widths in enumerate(sizes):
            rows = slice(number * count // len(sizes), (number + 1) * count // len(sizes))
            shift = (images[rows, None] % CLASSES - 1).astype(np.float32)
            params = {
                f"layer_{i}": {
                    "kernel": rng.uniform(-1 / fan_in, 1 / fan_in, (len(shift), fan_in, fan_out)).astype(np.float32),
                    "bias": shift + rng.uniform(-0.5, 0.5, (len(shift), fan_out)).astype(np.float32),
                }
                for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths))
            }
            spec = ngjax.mlp_spec(widths, activation="siren")
            writer.append(spec, params, {name: column[rows] for name, column in labels.items()})
    return path


@pytest.fixture(scope="module")
def small_zoo(tmp_path_factory):
    return write_zoo(tmp_path_factory.mktemp("zoo") / "small")


def config_for(script, preset, small_zoo, out, **changes):
    """A preset, so small that it runs in seconds. The batch is shared by the eight devices of the tests."""
    small = {"zoo": small_zoo, "out": out, "seeds": (0,), "batch_size": 8, "epochs": 1 / 3, "eval_every": 2}
    config = dataclasses.replace(script.PRESETS[preset], **{**small, "warmup_steps": 1, **changes})
    narrow = {
        "ng-gnn": {"features": 4, "layers": 1, "probes": 4},
        "ng-t": {
            **dict.fromkeys(("node_features", "edge_features", "attention_features", "node_hidden", "edge_hidden"), 4),
            "layers": 1,
            "heads": 2,
            "probes": 0,
        },
        "mlp": {"hidden": (8,)},
        "probes": {"hidden": (8,), "probes": 4},
    }[preset.split("-", 1)[1]]
    return dataclasses.replace(config, **{name: value for name, value in narrow.items() if name not in changes})


# -- a whole run ------------------------------------------------------------------------------------------------------


def whole_config(script, small_zoo, out, **changes):
    """The MLP for as long as it takes to learn the classes, with a checkpoint at every validation."""
    settings = {"epochs": 10, "learning_rate": 0.01, "eval_every": 15, "hidden": (32,), "augmentation": "paper"}
    return config_for(script, "fast-mlp", small_zoo, out, **{**settings, "save_every_seconds": 0.0, **changes})


@pytest.fixture(scope="module")
def run(script, small_zoo, tmp_path_factory):
    """Two seeds; their configuration, results and folder."""
    out = tmp_path_factory.mktemp("runs") / "new" / "mlp"
    config = whole_config(script, small_zoo, out, seeds=(0, 1))
    return config, script.main(config), out


def test_results_are_complete(run):
    config, results, out = run
    assert json.loads((out / "results.json").read_text()) == results
    assert results["networks"] == {"train": 72, "validation": 24, "test": 24}
    assert [outcome["seed"] for outcome in results["seeds"]] == [0, 1]
    assert results["config"]["hidden"] == list(config.hidden)
    assert results["zoo"]["provenance"]
    assert results["zoo"]["metadata"]["omega"] == 30
    assert results["deviation"]["test_accuracy"] >= 0
    assert len(results["table"]) == 5
    for outcome in results["seeds"]:
        assert outcome["steps"] == 90
        assert outcome["resumed_from"] == 0
        confusion = np.array(outcome["confusion"])
        np.testing.assert_array_equal(confusion.sum(axis=1), [8, 8, 8])
        assert np.trace(confusion) / 24 == pytest.approx(outcome["test_accuracy"])
    means = [outcome["test_accuracy"] for outcome in results["seeds"]]
    assert results["mean"]["test_accuracy"] == pytest.approx(np.mean(means))
    assert results["mean"]["test_accuracy"] == pytest.approx(np.mean(list(results["class_accuracy"].values())))


def test_it_learns_what_there_is_to_learn(run):
    _, results, _ = run
    assert results["mean"]["test_accuracy"] > 0.9
    # The neurons of a layer are alike.
    assert results["mean"]["shuffled_test_accuracy"] > 0.6
    assert min(outcome["largest_logit_change"] for outcome in results["seeds"]) > 0


def test_pictures_are_there_and_nothing_half_written_is(run):
    _, _, out = run
    assert {path.name for path in out.iterdir()} == {
        "results.json", "learning_curves.png", "confusion.png", "seed-0", "seed-1",
    }  # fmt: skip
    for name in ("learning_curves.png", "confusion.png"):
        pixels = image.imread(out / name)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.05  # not blank


def test_the_best_model_is_the_one_that_was_tested(script, run):
    """Reloaded by hand, it has the accuracies of the results, and no validation before or after was better."""
    config, results, out = run
    data = script.open_data(config.zoo, networks=None, validation_fraction=0.1)
    classifier = script.make_classifier(config, data)
    for outcome in results["seeds"]:
        folder = out / f"seed-{outcome['seed']}"
        variables = script.read_variables(folder / "best.safetensors")
        for part in ("validation", "test"):
            networks = data.read(data.rows[part])
            predictions = classifier.apply(variables, networks.params, None).argmax(-1)
            assert np.mean(predictions == networks.labels) == pytest.approx(outcome[f"{part}_accuracy"])
        rows = {row["step"]: row for row in train.read_metrics(folder / "metrics.jsonl") if "eval/accuracy" in row}
        assert list(rows) == [15, 30, 45, 60, 75, 90]
        best = max(rows.values(), key=lambda row: row["eval/accuracy"])  # the first of equal ones
        assert (best["step"], best["eval/accuracy"]) == (outcome["best_step"], outcome["validation_accuracy"])


def test_a_finished_run_is_not_repeated(script, run):
    config, results, _ = run
    again = script.main(dataclasses.replace(config, if_exists="resume"))
    assert again["seeds"] == results["seeds"]
    with pytest.raises(FileExistsError, match="already holds a run"):
        script.main(config)


def test_other_settings_do_not_continue_a_run(script, run):
    config, _, _ = run
    changed = dataclasses.replace(config, if_exists="resume", learning_rate=0.5, networks=16)
    with pytest.raises(ValueError, match=r"learning_rate: was 0\.01, now 0\.5; rows: was .*72.*, now .*16"):
        script.main(changed)


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("fast-ng-gnn", {"augmentation": "paper", "fourier_frequencies": 4}),
        ("paper-probes", {"permutation": True}),
        ("paper-mlp", {"augmentation": "reference"}),
    ],
)
def test_every_model_runs(script, small_zoo, tmp_path, preset, changes):
    results = script.main(config_for(script, preset, small_zoo, tmp_path / "out", **changes))
    (outcome,) = results["seeds"]
    assert outcome["steps"] == 3
    assert outcome["best_step"] in (2, 3)
    if "mlp" not in preset:
        assert outcome["largest_logit_change"] < 1e-3 * outcome["largest_logit"]
    if "ng" in preset:
        best = ngjax.load_model(tmp_path / "out" / "seed-0" / "best.safetensors")
        assert best.metadata["step"] == str(outcome["best_step"])
        opened = zoo.open(small_zoo)
        rows, spec = opened.rows(split="test"), opened.specs[0]
        run_model = jax.jit(functools.partial(best.model.apply, spec=spec))
        logits = run_model(best.variables, ngjax.to_groups(spec, opened.read(rows)))
        accuracy = np.mean(logits.argmax(-1) == opened.labels["label"][rows])
        assert accuracy == pytest.approx(outcome["test_accuracy"])


@pytest.mark.parametrize(("preset", "reference", "width"), [("paper-ng-gnn", 92_010, 32), ("paper-ng-t", 376_586, 64)])
def test_presets_have_the_size_of_the_papers_models(script, tmp_path, preset, reference, width):
    """But for the rows of the position table, which is larger here, and second biases of sums, which are left out."""
    path = write_zoo(tmp_path / "zoo", sizes=((2, 32, 32, 1),))
    config = dataclasses.replace(script.PRESETS[preset], zoo=path, out=tmp_path, probes=0)
    data = script.open_data(path, networks=None, validation_fraction=0.1)._replace(classes=tuple("0123456789"))
    classifier = script.make_classifier(config, data)
    variables = jax.eval_shape(classifier.init, jax.random.key(0), data.read(data.rows["train"][:1]).params)
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    more_positions = (16 + 8 + 16) - (2 + 2 + 1)
    assert size == reference + more_positions * width - 3 * 2 * width


# -- killed and resumed -----------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def run_until(script, config, step):
    """Stops a run when a step has been validated and its model is kept, but not yet its checkpoint."""

    class BestModels(script.BestModels):
        def offer(self, at, accuracy, params):
            super().offer(at, accuracy, params)
            if at == step:
                raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "BestModels", BestModels)
        with pytest.raises(Killed):
            script.main(config)


def final_state(folder):
    """The best model, the metrics without their times, and what came out."""
    rows = train.read_metrics(folder / "metrics.jsonl")
    outcome = json.loads((folder / "result.json").read_text())
    return (
        (folder / "best.safetensors").read_bytes(),
        [{name: value for name, value in row.items() if name != "time"} for row in rows],
        {name: value for name, value in outcome.items() if name not in ("seconds", "resumed_from")},
    )


def test_a_killed_run_ends_as_if_never_killed(script, run, small_zoo, tmp_path):
    """And better models of steps that were undone do not count: on other devices they may not come again."""
    config = whole_config(script, small_zoo, tmp_path, seeds=(1,), if_exists="resume")
    run_until(script, config, 45)
    folder, whole = tmp_path / "seed-1", run[2] / "seed-1"
    assert not (tmp_path / "results.json").exists()
    for path in (folder / "bests" / "0000000045.safetensors", folder / "best.safetensors"):
        script.save_variables(path, {"params": {"w": np.zeros(3)}}, {"step": "45", "accuracy": "1.0"})
    results = script.main(config)
    assert results["seeds"][0]["resumed_from"] == 30
    assert final_state(folder) == final_state(whole)


def test_overwriting_starts_from_nothing(script, run, small_zoo, tmp_path):
    config = whole_config(script, small_zoo, tmp_path, seeds=(1,))
    run_until(script, dataclasses.replace(config, augmentation="none"), 30)
    folder, whole = tmp_path / "seed-1", run[2] / "seed-1"
    losses = [[row["loss"] for row in train.read_metrics(of / "metrics.jsonl")] for of in (folder, whole)]
    assert abs(losses[0][0] - losses[1][0]) > 1e-4, "networks are augmented"
    results = script.main(dataclasses.replace(config, if_exists="overwrite"))
    assert results["seeds"][0]["resumed_from"] == 0
    assert final_state(folder) == final_state(whole)


def test_the_first_of_equally_good_models_stays(script, tmp_path):
    bests = script.BestModels(tmp_path, script.save_variables)
    for step, accuracy in ((10, 0.5), (20, 0.5), (30, 0.75), (40, 0.6)):
        bests.offer(step, accuracy, {"w": np.full(2, step)})
    assert script.read_metadata(bests.path) == {"step": "30", "accuracy": "0.75"}
    np.testing.assert_array_equal(script.read_variables(bests.path)["w"], [30, 30])
    bests.go_back(29)
    assert script.read_metadata(bests.path) == {"step": "10", "accuracy": "0.5"}
    bests.go_back(9)
    assert not bests.path.exists()


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["label", "split"])
def test_a_zoo_without_labels_raises(script, tmp_path, name):
    path = write_zoo(tmp_path / "zoo", without=(name,))
    with pytest.raises(ValueError, match=f"no label '{name}'; they have .*image") as error:
        script.open_data(path, networks=None, validation_fraction=0.1)
    assert str(path) in str(error.value)


def test_a_zoo_of_several_architectures_raises(script, tmp_path):
    path = write_zoo(tmp_path / "zoo", sizes=(SIZES, (2, 4, 1)))
    with pytest.raises(ValueError, match="2 architectures"):
        script.open_data(path, networks=None, validation_fraction=0.1)


def test_probes_need_the_usual_sines(script, tmp_path):
    config = config_for(script, "fast-ng-gnn", write_zoo(tmp_path / "zoo", omega=15.0), tmp_path / "out")
    with pytest.raises(ValueError, match="omega is 15"):
        script.main(config)


def test_the_first_networks(script, small_zoo):
    data = script.open_data(small_zoo, networks=10, validation_fraction=0.1)
    np.testing.assert_array_equal(data.rows["train"], np.arange(10))
    assert len(data.rows["validation"]) == len(data.rows["test"]) == 24
    with pytest.raises(ValueError, match="73 training networks were asked for, and it has 72"):
        script.open_data(small_zoo, networks=73, validation_fraction=0.1)


def test_validation_without_its_own_split_is_by_image(script, tmp_path):
    path = write_zoo(tmp_path / "zoo", validation=False)
    data = script.open_data(path, networks=None, validation_fraction=0.25)
    assert {part: len(rows) for part, rows in data.rows.items()} == {"train": 72, "validation": 24, "test": 24}
    images = data.zoo.labels["image"]
    trained, validated = (set(images[data.rows[part]].tolist()) for part in ("train", "validation"))
    assert trained.isdisjoint(validated)
    assert len(validated) == 12
    assert max(trained | validated) < 48
    again = script.open_data(path, networks=None, validation_fraction=0.25)
    np.testing.assert_array_equal(again.rows["validation"], data.rows["validation"])
    with pytest.raises(ValueError, match="validation_fraction=1.0"):
        script.open_data(path, networks=None, validation_fraction=1.0)


def test_statistics_of_another_zoo(script, small_zoo, tmp_path):
    other = write_zoo(tmp_path / "zoo", validation=False)
    data = script.open_data(small_zoo, networks=None, validation_fraction=0.1)
    assert len(script.read_for_statistics(data, None)["layer_0"]["bias"]) == 72
    assert len(script.read_for_statistics(data, other)["layer_0"]["bias"]) == 96


# -- command line -----------------------------------------------------------------------------------------------------


def test_every_setting_has_a_flag(script):
    flags = ["--zoo", "a", "--out", "b", "--probes", "0", "--seeds", "4", "5", "--augmentation", "reference"]
    config = script.parse(["paper-ng-gnn", *flags, "--clip-norm", "1"])
    expected = dataclasses.replace(
        script.PRESETS["paper-ng-gnn"],
        zoo=pathlib.Path("a"),
        out=pathlib.Path("b"),
        probes=0,
        seeds=(4, 5),
        augmentation="reference",
        clip_norm=1.0,
    )
    assert config == expected
    assert script.parse(["fast-ng-t", "--zoo", "a", "--out", "b"]).heads == 4


def test_a_missing_zoo_is_named(script, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none")):
        script.main(script.parse(["fast-mlp", "--zoo", str(tmp_path / "none"), "--out", str(tmp_path / "out")]))
