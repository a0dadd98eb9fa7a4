"""Zoos from the digits, small enough for seconds: what is in them, and what a kill leaves."""

import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tyro
from matplotlib import image

from ngjax import zoo

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "make_inr_zoo.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_inr_zoo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_inr_zoo"] = module  # where dataclasses look up the annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_inr_zoo"]


@pytest.fixture(scope="module")
def arguments():
    """16 networks for training, 4 for validation and 8 for testing, dealt to two architectures; eight shards."""
    return [
        *("--images", "digits", "--train", "8", "--validation", "2", "--test", "4", "--views", "2"),
        *("--sizes", "2-4-1", "2-3-3-1", "--steps", "3", "--shard", "8", "--floor", "11"),
    ]


@pytest.fixture(scope="module")
def config(script, arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("zoos") / "new" / "folder"
    return tyro.cli(script.Config, args=["--out", str(out), *arguments])


@pytest.fixture(scope="module")
def report(script, config):
    return script.main(config)


def params_and_labels(folder):
    opened = zoo.open(folder)
    return [(opened[i].params, {k: v[i] for k, v in opened.labels.items()}) for i in range(len(opened))]


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def test_networks_draw_their_images(script, config, report):
    made, sets = zoo.open(config.out), {split: zoo.load_images("digits", split) for split in ("train", "test")}
    made.verify()
    assert len(made) == 28
    recipe = script.recipe_of(config)
    for entry in made:
        images = sets["test" if entry.labels["split"] == "test" else "train"]
        drawn = zoo.render(entry.params, 8, 8, omega=recipe.omega, output_offset=recipe.output_offset)
        mse = np.mean((drawn - images.images[entry.labels["image"]]) ** 2)
        np.testing.assert_allclose(entry.labels["psnr"], -10 * np.log10(mse), atol=1e-3)
        assert entry.labels["label"] == images.labels[entry.labels["image"]]
        assert entry.labels["steps"] == 3
    assert {name: str(column.dtype) for name, column in made.labels.items()} == {
        **dict.fromkeys(("label", "image", "view", "split", "steps"), "int32"),
        "psnr": "float32",
    }


def test_splits_share_no_image_and_parts_of_the_zoo_come_in_order(config, report):
    made = zoo.open(config.out)
    of_split = {split: made.labels["image"][made.rows(split=split)] for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in of_split.items()} == {"train": 16, "validation": 4, "test": 8}
    assert not set(of_split["train"]) & set(of_split["validation"])
    for rows in of_split.values():
        assert (np.unique(rows, return_counts=True)[1] == 2).all(), "two views of every image"
    # Runs of 8 networks are in order; each is apart by architecture.
    order = [["test", "validation", "train"].index(made.categories["split"][code]) for code in made.labels["split"]]
    runs = [sorted(order[first : first + 8]) for first in range(0, 28, 8)]
    assert list(itertools.chain(*runs)) == sorted(order)


def test_both_architectures_get_their_share_and_the_views_of_an_image_differ(config, report):
    made = zoo.open(config.out)
    sizes = [tuple(group.size for group in spec.node_groups) for spec in made.specs]
    assert sorted(sizes) == [(2, 3, 3, 1), (2, 4, 1)]
    np.testing.assert_array_equal(np.bincount(made.spec_ids), [14, 14])
    by_image = {}
    for number, split, row in zip(made.spec_ids, made.labels["split"], made.labels["image"], strict=True):
        by_image.setdefault((split, row), []).append(number)
    assert all(sorted(numbers) == [0, 1] for numbers in by_image.values())


def test_report_and_pictures(config, report):
    assert json.loads((config.out / "report.json").read_text()) == report
    assert report["networks"] == report["networks_of_this_run"] == 28
    assert report["metadata"] == zoo.open(config.out).metadata
    assert report["metadata"]["recipe"]["steps"] == 3
    assert report["metadata"]["recipe"]["learning_rate"] == zoo.RECIPES["fast"].learning_rate
    assert len(report["table"]) == 2 + 6
    psnr = zoo.open(config.out).labels["psnr"]
    assert report["below_floor"] == np.flatnonzero(psnr < 11).tolist()
    assert sum(int(line.split("|")[8]) for line in report["table"][2:]) == len(report["below_floor"]) > 0
    for name in ("psnr.png", "networks.png"):
        assert image.imread(config.out / name).std() > 0.01


def test_a_killed_zoo_goes_on_where_it_was(script, arguments, config, report, tmp_path):
    """Killed with the fourth shard half written."""
    out = tmp_path / "killed"
    code = f"""
import os, signal, sys
sys.argv = {[str(SCRIPT), "--out", str(out), *arguments]!r}
import safetensors.numpy
save, shards = safetensors.numpy.save, []
def save_or_die(tensors):
    shards.append(0)
    if len(shards) == 4:
        with open({str(out / ".unfinished-0-shard-00003.safetensors")!r}, "wb") as file:
            file.write(save(tensors)[:100])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return save(tensors)
safetensors.numpy.save = save_or_die
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    # As in this process: rounding is to be the same.
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole = shards(config.out)
    assert shards(out) == {name: whole[name] for name in list(whole)[:3]}

    resumed = script.main(dataclasses.replace(config, out=out, if_exists="resume"))
    assert shards(out) == whole
    assert not list(out.glob(".unfinished*"))
    assert (resumed["networks"], resumed["networks_of_this_run"]) == (28, 28 - 12)
    assert len(zoo.open(out).provenance) == 2


def test_a_finished_zoo_resumes_with_nothing_to_do(script, config, report):
    before = shards(config.out)
    again = script.main(dataclasses.replace(config, if_exists="resume"))
    assert again["networks_of_this_run"] == 0
    assert again["table"] == report["table"]
    assert shards(config.out) == before


def test_other_settings_do_not_resume(script, config, report):
    for change, message in (
        ({"steps": 4}, "recipe.steps: 3 in the zoo, received 4"),
        ({"seed": 1}, "seed: 0 in the zoo, received 1"),
        ({"shard": 4}, "shard: 8 in the zoo, received 4"),
        ({"train": 9}, "splits.train: 8 in the zoo, received 9"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main(dataclasses.replace(config, if_exists="resume", **change))


def test_existing_zoos_are_refused_or_overwritten(script, config, report, tmp_path):
    before = shards(config.out)
    with pytest.raises(FileExistsError, match="already holds a zoo"):
        script.main(config)
    assert shards(config.out) == before

    small = dataclasses.replace(config, out=tmp_path, train=2, validation=1, test=1, views=1, sizes=())
    script.main(small)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "index.json").unlink()  # as a kill in the middle of overwriting leaves it
    with pytest.raises(FileExistsError, match="already holds a zoo"):
        script.main(small)
    script.main(dataclasses.replace(small, if_exists="overwrite", train=3))
    assert len(zoo.open(tmp_path)) == 5
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with zoo.ZooWriter(tmp_path), pytest.raises(BlockingIOError):
        script.main(dataclasses.replace(small, if_exists="overwrite"))
    assert len(zoo.open(tmp_path)) == 5


def test_starts_depend_on_seed_split_image_and_view_alone(script, config, tmp_path):
    """With other numbers of images the same networks come out."""
    start = dataclasses.replace(config, out=tmp_path / "few", steps=0, sizes=())
    for change in (
        {},
        {"out": tmp_path / "many", "train": 12, "test": 6, "views": 3, "shard": 5},
        {"out": tmp_path / "other", "seed": 1},
    ):
        script.main(dataclasses.replace(start, **change))

    def by_name(folder):
        made = zoo.open(tmp_path / folder)
        names = zip(*(made.labels[name].tolist() for name in ("split", "image", "view")), strict=True)
        return {name: np.asarray(made[i].params["layer_1"]["kernel"]) for i, name in enumerate(names)}

    few, many, other = map(by_name, ("few", "many", "other"))
    assert len(few) == 28
    assert len(many) == 60
    assert all(np.array_equal(few[name], many[name]) for name in few)
    assert not any(np.array_equal(few[name], other[name]) for name in few)
    assert len({kernel.tobytes() for kernel in many.values()}) == 60


def test_broken_fits_stop_the_run(script, config, tmp_path):
    with pytest.raises(ValueError, match=r"no finite PSNR; the first is that of image \d+ \(test, view 0\)"):
        script.main(dataclasses.replace(config, out=tmp_path / "zoo", learning_rate=1e38))
    assert len(zoo.open(tmp_path / "zoo")) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": 1436}, "digits has 1437 training and 360 test images; asked for 1436 for training and 2 for"),
        ({"test": 361}, "asked for 8 for training and 2 for validation, and 361 for testing"),
        ({"train": -1}, "train: expected a number of images, received -1"),
        ({"train": 0, "validation": 0, "test": 0}, "at least one image"),
        ({"views": 0}, "views: expected at least one network per image, received 0"),
        ({"sizes": ("2-4-3",)}, "1 outputs, the channels of an image; received 2-4-3"),
        ({"sizes": ("3-4-1",)}, "expected 2 inputs"),
        ({"sizes": ("2-1",)}, "received '2-1'"),
        ({"sizes": ("2-0-1",)}, "received '2-0-1'"),
        ({"sizes": ("2x4x1",)}, "received '2x4x1'"),
        ({"sizes": ("2-4-1", "2-04-1")}, "twice"),
    ],
)
def test_impossible_settings_raise_before_any_work(script, config, tmp_path, change, message):
    out = tmp_path / "zoo"
    with pytest.raises(ValueError, match=message):
        script.main(dataclasses.replace(config, out=out, **change))
    assert not out.exists()


def test_numbers_given_replace_those_of_the_recipe(script, config):
    assert script.recipe_of(script.Config(out=config.out, recipe="nfn")) == zoo.RECIPES["nfn"]
    changed = script.Config(
        out=config.out, recipe="dwsnets", stop_psnr=float("inf"), output_offset=0.0, pixel_range=(-1.0, 1.0)
    )
    expected = zoo.RECIPES["dwsnets"]._replace(stop_psnr=None, output_offset=0.0, pixel_range=(-1.0, 1.0))
    assert script.recipe_of(changed) == expected


def test_defaults_use_all_images(script, config):
    drawn = script.draw_images(script.Config(out=config.out), 60_000, 10_000)
    assert {split: len(rows) for split, rows in drawn.items()} == {"train": 55_000, "validation": 5_000, "test": 10_000}
    assert len(set(drawn["train"]) | set(drawn["validation"])) == 60_000


@pytest.mark.parametrize("name", zoo.RECIPES)
def test_shards_are_about_a_minute(script, name):
    """At 0.1 ms per step of a network 2-32-32-1 on 28 x 28 pixels, which is what two cores take."""
    networks = script.networks_per_minute(zoo.RECIPES[name], [(2, 32, 32, 1)], (28, 28, 1))
    assert 30 < networks * zoo.RECIPES[name].steps * 1e-4 < 90


def test_keys_differ(script):
    split, row, view = (grid.ravel().astype(np.int32) for grid in np.meshgrid(range(3), range(4), range(2)))
    keys = script.network_keys(jax.random.key(0), split, row, view)
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == 24
