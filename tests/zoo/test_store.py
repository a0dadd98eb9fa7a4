"""Zoos on disk: what is written is read, transactions, several processes, and broken folders."""

import functools
import hashlib
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.core import freeze

import ngjax
from ngjax import zoo
from ngjax.actions import fixed
from ngjax.spec import NodeGroup, ParamSpec, PathKey, param_view
from tests.test_files import largest_file
from tests.zoo import zoo_processes

ROOT = pathlib.Path(__file__).parents[2]
SPEC = ngjax.mlp_spec((2, 3, 1), activation="siren")
WIDE = ngjax.mlp_spec((2, 5, 1), activation="siren")
CATEGORIES = {"split": ("train", "validation", "test")}


def networks(count, spec=SPEC, seed=0):
    rng = np.random.default_rng(seed)
    leaves = [rng.standard_normal((count, *param.shape)).astype(param.dtype) for param in spec.params]
    return spec.unflatten(leaves)


def labels(count, first=0):
    numbers = np.arange(first, first + count)
    return {
        "label": (numbers % 3).astype(np.int32),
        "split": (numbers % 2).astype(np.int8) * 2,
        "psnr": (numbers / 2).astype(np.float32),
    }


def assert_equal_trees(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)


def take(params, rows):
    return jax.tree.map(lambda leaf: leaf[rows], params)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "zoo"
    metadata = {"images": "digits", "recipe": {"steps": 5}}
    with zoo.ZooWriter(path, metadata=metadata, categories=CATEGORIES) as writer:
        writer.append(SPEC, networks(4, seed=1), labels(4))
        writer.append(WIDE, networks(3, WIDE, seed=2), labels(3, first=4))
        writer.append(SPEC, networks(2, seed=3), labels(2, first=7))
    return path


@pytest.fixture
def folder(written, tmp_path):
    """A zoo of 4 + 3 + 2 networks in three shards, the second of another architecture."""
    return pathlib.Path(shutil.copytree(written, tmp_path / "zoo"))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# -- reading ----------------------------------------------------------------------------------------------------------


def test_one_network(folder):
    opened = zoo.open(folder)
    assert len(opened) == 9
    for row, (params, spec) in {
        0: (take(networks(4, seed=1), 0), SPEC),
        3: (take(networks(4, seed=1), 3), SPEC),
        4: (take(networks(3, WIDE, seed=2), 0), WIDE),
        6: (take(networks(3, WIDE, seed=2), 2), WIDE),
        8: (take(networks(2, seed=3), 1), SPEC),
    }.items():
        for index in (row, row - 9, np.int64(row)):
            entry = opened[index]
            assert isinstance(entry, zoo.Entry)
            assert_equal_trees(entry.params, params)
            assert entry.spec == spec
            assert entry.labels == {
                "label": row % 3,
                "split": ("train", "test")[row % 2],
                "psnr": row / 2,
            }


def test_a_loop_visits_every_network_once(folder):
    opened = zoo.open(folder)
    assert [float(entry.labels["psnr"]) for entry in opened] == [i / 2 for i in range(9)]


@pytest.mark.parametrize("index", [9, -10, 10**30])
def test_networks_that_are_not_there(index, folder):
    with pytest.raises(IndexError, match="of a zoo of 9 networks.*zoo"):
        zoo.open(folder)[index]


@pytest.mark.parametrize("index", [slice(2), [1, 2], 1.0, "1", None])
def test_only_one_network_at_a_time(index, folder):
    with pytest.raises(TypeError, match=r"zoo\.read\(rows\) reads many"):
        zoo.open(folder)[index]


def test_many_networks_in_any_order(folder):
    opened = zoo.open(folder)
    first, last = networks(4, seed=1), networks(2, seed=3)
    everything = jax.tree.map(lambda a, b: np.concatenate([a, np.full((3, *a.shape[1:]), np.nan), b]), first, last)
    everything = jax.tree.map(np.float32, everything)
    for rows in (
        [0],
        [8, 0, 3, 8, 7, 1],
        [-1, -2, 0],
        np.array([2, 7], np.int8),
        np.array([2, 7], np.uint64),
        range(4),
    ):
        assert_equal_trees(opened.read(rows), take(everything, np.asarray(rows).astype(int)))
    assert_equal_trees(opened.read(jnp.array([3, 7])), take(everything, [3, 7]))
    mask = (opened.spec_ids == 0) & (opened.labels["label"] == 1)
    assert_equal_trees(opened.read(mask), take(everything, [1, 7]))
    assert_equal_trees(opened.read([5, 4]), take(networks(3, WIDE, seed=2), [1, 0]))


def test_no_rows_have_shapes_where_there_is_one_architecture(folder, tmp_path):
    with pytest.raises(ValueError, match="one of the 2 architectures, received no rows"):
        zoo.open(folder).read([])
    with zoo.ZooWriter(tmp_path / "one") as writer:
        writer.append(SPEC, networks(2), {})
    for rows in ([], np.zeros(2, bool)):
        assert_equal_trees(zoo.open(tmp_path / "one").read(rows), networks(0))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, 9], IndexError, "network 9 of a zoo of 9"),
        ([0, -10], IndexError, "network -10 of a zoo of 9"),
        (np.array([2**64 - 1], np.uint64), IndexError, "network 18446744073709551615 of"),
        ([0.0, 1.0], TypeError, r"integers \[rows\], received float64\[2\]"),
        ([[0, 1]], TypeError, r"received int64\[1, 2\]"),
        (3, TypeError, r"received int64\[\]"),
        (np.ones(8, bool), IndexError, r"a mask has to be of shape \(9,\), received \(8,\)"),
        ([0, 4], ValueError, r"received rows of architectures 0, 1; zoo\.spec_ids"),
    ],
)
def test_rows_that_cannot_be_read(rows, error, message, folder):
    with pytest.raises(error, match=message):
        zoo.open(folder).read(rows)


def test_what_is_read_is_ones_own_and_entries_are_not_writable(folder):
    opened = zoo.open(folder)
    before = files_of(folder)
    for leaf in jax.tree.leaves(opened.read([0, 1])):
        leaf[...] = 7.0
    for leaf in jax.tree.leaves(opened[0].params):
        with pytest.raises(ValueError, match="read-only"):
            leaf[...] = 7.0
        with pytest.raises(ValueError, match="WRITEABLE"):
            leaf.flags.writeable = True
    assert files_of(folder) == before


def test_jax_takes_what_is_read(folder):
    opened = zoo.open(folder)
    params = jax.tree.map(jnp.asarray, opened[0].params)
    value = zoo.apply_siren(params, jnp.ones((1, 2)))
    del opened
    np.testing.assert_array_equal(value, zoo.apply_siren(take(networks(4, seed=1), 0), jnp.ones((1, 2))))


def test_labels_are_columns(folder):
    opened = zoo.open(folder)
    assert list(opened.labels) == ["label", "split", "psnr"]
    for name, column in labels(9).items():
        assert opened.labels[name].dtype == column.dtype
        np.testing.assert_array_equal(opened.labels[name], column)
        assert not opened.labels[name].flags.writeable  # what `rows` looks at
    np.testing.assert_array_equal(opened.spec_ids, [0] * 4 + [1] * 3 + [0] * 2)
    assert opened.specs == (SPEC, WIDE)
    assert opened.categories == CATEGORIES
    assert opened.metadata == {"images": "digits", "recipe": {"steps": 5}}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, range(9)),
        ({"split": "test"}, [1, 3, 5, 7]),
        ({"split": 2}, [1, 3, 5, 7]),
        ({"split": "validation"}, []),
        ({"label": 1, "split": "train"}, [4]),
        ({"label": np.int32(7)}, []),
        ({"psnr": 1.5}, [3]),
    ],
)
def test_rows_are_found_by_their_labels(values, expected, folder):
    rows = zoo.open(folder).rows(**values)
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, list(expected))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"digit": 3}, "has no label 'digit'; it has label, split, psnr"),
        ({"split": "tset"}, "is never 'tset'; it is one of train, validation, test"),
        ({"label": "3"}, "'label' of .* is never '3'; it is int32"),
        ({"label": [1, 2]}, r"'label': expected one value, received \[1, 2\]"),
    ],
)
def test_labels_that_the_zoo_does_not_have(values, message, folder):
    with pytest.raises(ValueError, match=message):
        zoo.open(folder).rows(**values)


def test_it_says_what_it_is(folder):
    text = str(zoo.open(folder))
    assert text == repr(zoo.open(folder))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for part in (str(folder), "9 networks", "6 x 2-3-1", "3 x 2-5-1", "split (train, validation, test), psnr"):
        assert part in text
    assert f"{size / 1e6:.1f} MB" in text


def test_an_open_zoo_does_not_change(folder):
    opened = zoo.open(folder)
    packed = pickle.dumps(opened)
    with zoo.ZooWriter(folder) as writer:
        writer.append(SPEC, networks(1), labels(1))
    assert len(zoo.open(folder)) == 10
    for same in (opened, pickle.loads(packed)):
        assert len(same) == len(same.labels["psnr"]) == 9
        assert_equal_trees(same.read([8]), take(networks(2, seed=3), [1]))
        with pytest.raises(IndexError):
            same[9]


def test_files_are_not_kept_open(folder):
    files = pathlib.Path("/dev/fd")
    before = len(list(files.iterdir()))
    opened = zoo.open(folder)
    opened.verify()
    assert opened[0].labels
    assert len(list(files.iterdir())) == before


def test_the_path_stays_when_the_working_directory_changes(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    opened = zoo.open("zoo")
    packed = pickle.dumps(opened)
    monkeypatch.chdir("/")
    assert opened.path == folder
    assert len(pickle.loads(packed)) == 9


# -- what can be stored -----------------------------------------------------------------------------------------------


def chain_spec(root, dtype="float32", extra=()):
    """One layer from 2 to 1 neurons, its weights at `root`, and further leaves without a home."""
    params = (ParamSpec(root, (2, 1), dtype, ("in", "out")), *extra)
    nodes = (NodeGroup("in", 2, "input", 0, "in", slots=2), NodeGroup("out", 1, "output", 1, "out"))
    view = param_view(0, (2, 1), source=(0,), target=(1,))
    edges = (ngjax.spec.EdgeGroup("edges", "in", "out", view=view),)
    return ngjax.NeuralGraphSpec(params, nodes, edges, (fixed("in", 2, "input"), fixed("out", 1, "output")))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_floats_of_every_size(dtype, tmp_path):
    spec = ngjax.mlp_spec((2, 3, 1), dtype=dtype)
    params = networks(5, spec)
    with zoo.ZooWriter(tmp_path) as writer:
        writer.append(spec, params, {"flag": np.array([True, False, True, True, False])})
        writer.append(SPEC, networks(3), {"flag": np.zeros(3, bool)})
        writer.append(spec, params, {"flag": np.ones(5, bool)})
    opened = zoo.open(tmp_path)
    opened.verify()
    assert_equal_trees(opened.read([4, 0, 12]), take(params, [4, 0, 4]))
    assert_equal_trees(opened[9].params, take(params, 1))
    np.testing.assert_array_equal(opened.rows(flag=True), [0, 2, 3, 8, 9, 10, 11, 12])


def test_leaves_without_a_home_and_trees_of_lists(tmp_path):
    root = (PathKey("list", 0), PathKey("dict", "a/b"))
    extra = (
        ParamSpec((PathKey("list", 1), PathKey("tuple", 0)), (), "int32"),
        ParamSpec((PathKey("list", 1), PathKey("tuple", 1)), (2, 0), "uint8"),
        ParamSpec((PathKey("list", 2),), (3,), "bool"),
    )
    spec = chain_spec(root, extra=extra)
    params = [
        {"a/b": np.arange(6, dtype=np.float32).reshape(3, 2, 1)},
        (np.arange(3, dtype=np.int32), np.zeros((3, 2, 0), np.uint8)),
        np.eye(3, dtype=bool),
    ]
    with zoo.ZooWriter(tmp_path) as writer:
        writer.append(spec, params, {})
    opened = zoo.open(tmp_path)
    assert_equal_trees(opened.read([2, 0]), take(params, [2, 0]))
    assert_equal_trees(opened[1].params, take(params, np.array(1)))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(opened[1].params))
    assert opened.labels == {}


def test_a_spec_may_name_its_parameters_in_any_order(tmp_path):
    """JAX sorts the keys of dicts; a spec made by hand need not."""
    spec = chain_spec((PathKey("dict", "weight"),), extra=(ParamSpec((PathKey("dict", "age"),), (), "int32"),))
    params = {"age": np.arange(3, dtype=np.int32), "weight": np.arange(6, dtype=np.float32).reshape(3, 2, 1)}
    with zoo.ZooWriter(tmp_path) as writer:
        writer.append(spec, params, {})
    opened = zoo.open(tmp_path)
    assert_equal_trees(opened.read([1, 0]), take(params, [1, 0]))
    assert_equal_trees(opened[2].params, take(params, np.array(2)))


def test_other_mappings_come_back_as_dicts_and_jax_arrays_are_taken(tmp_path):
    params = networks(4)
    frozen = jax.tree.map(jnp.asarray, freeze(params))
    with zoo.ZooWriter(tmp_path) as writer:
        writer.append(ngjax.infer_spec(take(frozen, 0)), frozen, {"label": jnp.arange(4)})
    opened = zoo.open(tmp_path)
    assert_equal_trees(opened.read(range(4)), params)
    assert opened.labels["label"].tolist() == [0, 1, 2, 3]


def test_arrays_that_are_not_contiguous(tmp_path):
    params = jax.tree.map(lambda leaf: np.asfortranarray(leaf)[::-1], networks(6))
    with zoo.ZooWriter(tmp_path) as writer:
        writer.append(SPEC, params, {"label": np.arange(12)[::2]})
    opened = zoo.open(tmp_path)
    assert_equal_trees(opened.read(range(6)), take(networks(6), [5, 4, 3, 2, 1, 0]))
    np.testing.assert_array_equal(opened.labels["label"], np.arange(12)[::2])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (chain_spec((PathKey("attr", "weight"),)), "dicts, lists and tuples.*object with 'weight'"),
        (
            chain_spec((PathKey("dict", "w"),), extra=(ParamSpec((PathKey("dict", "key"),), (), "key<fry>"),)),
            "cannot store parameter key of dtype key<fry>",
        ),
        (
            chain_spec(
                (PathKey("dict", "a/b"),),
                extra=(ParamSpec((PathKey("dict", "a"), PathKey("dict", "b")), (), "int32"),),
            ),
            "two parameters have the path a/b",
        ),
    ],
)
def test_architectures_that_cannot_be_stored(spec, message, tmp_path):
    class Tree:
        """Anything: the paths alone say that it cannot be."""

    with zoo.ZooWriter(tmp_path) as writer, pytest.raises(ValueError, match=message):
        writer.append(spec, Tree(), {})


def test_the_files_are_plain(folder):
    """An index that anybody can read, and shards that any reader of safetensors takes."""
    index = json.loads((folder / "index.json").read_text())
    assert (index["format"], index["version"]) == ("ngjax.zoo", 1)
    assert [shard["rows"] for shard in index["shards"]] == [4, 3, 2]
    assert ngjax.NeuralGraphSpec.from_json(json.dumps(index["specs"][1])) == WIDE
    shard = safetensors.numpy.load_file(folder / index["shards"][1]["file"])
    params = networks(3, WIDE, seed=2)
    np.testing.assert_array_equal(shard["params/layer_0/kernel"], params["layer_0"]["kernel"])
    np.testing.assert_array_equal(shard["labels/psnr"], [2.0, 2.5, 3.0])
    assert set(files_of(folder)) == {"index.json", *(f"shard-0000{i}.safetensors" for i in range(3))}


# -- writing ----------------------------------------------------------------------------------------------------------


def test_a_new_zoo_is_empty(tmp_path):
    with zoo.ZooWriter(tmp_path / "a" / "b", metadata={"x": 1}, categories=CATEGORIES) as writer:
        assert len(writer) == 0
    opened = zoo.open(tmp_path / "a" / "b")
    opened.verify()
    assert (len(opened), opened.specs, opened.labels, opened.provenance) == (0, (), {}, ())
    assert (opened.metadata, opened.categories) == ({"x": 1}, CATEGORIES)
    assert list(opened) == []
    assert len(opened.rows()) == len(opened.spec_ids) == 0
    assert "0 networks" in str(opened)
    for read in (lambda: opened[0], lambda: opened[-1], lambda: opened.read([0])):
        with pytest.raises(IndexError, match="zoo of 0 networks"):
            read()
    with pytest.raises(ValueError, match="no rows"):
        opened.read([])


def test_writers_continue(folder):
    with zoo.ZooWriter(
        folder, metadata={"images": "digits", "recipe": {"steps": 5}}, categories={"split": list(CATEGORIES["split"])}
    ) as writer:
        assert len(writer) == 9
        writer.append(WIDE, networks(1, WIDE), labels(1))
        assert len(writer) == 10
    opened = zoo.open(folder)
    assert opened.specs == (SPEC, WIDE)
    assert opened.spec_ids[-1] == 1
    assert_equal_trees(opened[9].params, take(networks(1, WIDE), 0))


def test_where_networks_come_from_is_kept(tmp_path):
    for command in ("first", "second", "first"):
        with zoo.ZooWriter(tmp_path, provenance={"command": command, "seeds": (1, 2)}) as writer:
            writer.append(SPEC, networks(1), {})
    with zoo.ZooWriter(tmp_path, provenance={"command": "never used"}):
        pass
    opened = zoo.open(tmp_path)
    assert opened.provenance == tuple({"command": command, "seeds": [1, 2]} for command in ("first", "second"))
    shards = json.loads((tmp_path / "index.json").read_text())["shards"]
    assert [shard["provenance"] for shard in shards] == [0, 1, 0]


def changed(changes):
    return {**labels(4), **changes}


def without(name):
    return {key: column for key, column in labels(4).items() if key != name}


def spoiled(row, value):
    params = networks(4)
    params["layer_1"]["bias"][row, 0] = value
    return params


@pytest.mark.parametrize(
    ("params", "columns", "message"),
    [
        (networks(0), labels(0), "at least one network"),
        (spoiled(2, np.nan), labels(4), "append: network 2: layer_1/bias has values that are not finite"),
        (spoiled(3, -np.inf), labels(4), "network 3: layer_1/bias"),
        (networks(4, WIDE), labels(4), r"params/layer_0/bias: expected float32\[4, 3\].*received float32\[4, 5\]"),
        (
            {**networks(4), "layer_1": networks(5)["layer_1"]},
            labels(4),
            r"layer_1/bias: expected float32\[4, 1\], a network per row, received float32\[5, 1\]",
        ),
        (jax.tree.map(np.float64, networks(4)), labels(4), r"expected float32\[4, 3\].*received float64\[4, 3\]"),
        (take(networks(4), 0), labels(4), r"expected float32\[3, 3\].*received float32\[3\]"),
        ({"layer_0": networks(4)["layer_0"]}, labels(4), "layer_1/bias .* of the spec is missing"),
        (jax.tree.map(lambda leaf: leaf.astype(">f4"), networks(4)), labels(4), "expected float32.*received >f4"),
        (networks(4), changed({"psnr": np.array([1, 2, np.nan, 4], np.float32)}), "network 2: label 'psnr' .* finite"),
        (networks(4), changed({"split": np.array([0, 1, 2, 3], np.int8)}), "network 3: label 'split' is no code of tr"),
        (networks(4), changed({"split": np.array([0, -1, 2, 1], np.int8)}), "network 1: label 'split' is no code of"),
        (networks(4), changed({"split": np.zeros(4)}), r"other labels.*split: 'int8' in the zoo, received 'float64'"),
        (networks(4), changed({"label": np.arange(3, dtype=np.int32)}), r"label 'label': expected \[4\].*\[3\]"),
        (networks(4), changed({"label": np.int32(3)}), r"label 'label': expected \[4\].*received \[\]"),
        (networks(4), changed({"label": np.arange(4)}), "label: 'int32' in the zoo, received 'int64'"),
        (networks(4), without("label"), "label: 'int32' in the zoo, received none"),
        (networks(4), changed({"view": np.arange(4)}), "view: not in the zoo, received 'int64'"),
        (networks(4), changed({"label": np.array(["a", "b", "c", "d"])}), "cannot store <U1; texts are codes of"),
        (networks(4), changed({"": np.arange(4)}), "label '': expected a name"),
    ],
)
def test_what_does_not_fit_is_not_appended(params, columns, message, folder):
    before = files_of(folder)
    with zoo.ZooWriter(folder) as writer:
        with pytest.raises(ValueError, match=message):
            writer.append(SPEC, params, columns)
        assert files_of(folder) == before
        writer.append(SPEC, networks(4), labels(4))
    assert len(zoo.open(folder)) == 13


def test_categories_need_their_label(tmp_path):
    with zoo.ZooWriter(tmp_path, categories=CATEGORIES) as writer:
        for columns in ({}, {"split": np.zeros(2)}, {"split": np.zeros(2, bool)}):
            with pytest.raises(ValueError, match="label 'split' has categories: expected integer codes, received"):
                writer.append(SPEC, networks(2), columns)
    assert len(zoo.open(tmp_path)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"metadata": {"images": "mnist", "recipe": {"steps": 5, "rate": 1}}},
            "other metadata: images: 'digits' in the zoo, received 'mnist'; recipe.rate: not in the zoo, received 1",
        ),
        ({"metadata": {}}, "images: 'digits' in the zoo, received none; recipe: {'steps': 5} in the zoo"),
        ({"categories": {"split": ("train", "test")}}, "other categories: split: .* received .'train', 'test'.$"),
    ],
)
def test_a_zoo_of_something_else_is_not_continued(options, message, folder):
    before = files_of(folder)
    with pytest.raises(ValueError, match=message), zoo.ZooWriter(folder, **options):
        pass
    assert files_of(folder) == before
    with zoo.ZooWriter(folder):  # the lock is free
        pass


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metadata": {"a": np.float32(1)}}, TypeError, "metadata: .*float32"),
        ({"metadata": {"a": float("nan")}}, TypeError, "metadata: expected what JSON can say"),
        ({"provenance": {"path": pathlib.Path("a")}}, TypeError, "provenance: .*Path"),
        ({"categories": {"split": "train"}}, ValueError, "categories: 'split': expected a list of names"),
        ({"categories": {"split": ("a", "b", "a")}}, ValueError, "'split': a name is there twice"),
    ],
)
def test_what_an_index_cannot_say(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        zoo.ZooWriter(tmp_path / "zoo", **options)
    assert not (tmp_path / "zoo").exists()


def test_append_needs_the_block(folder):
    writer = zoo.ZooWriter(folder)
    with pytest.raises(ValueError, match="inside the writer's with block"):
        writer.append(SPEC, networks(1), labels(1))


def test_folders_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "file")), zoo.ZooWriter(tmp_path / "file" / "zoo"):
        pass


def test_files_of_others_are_left_alone(tmp_path):
    for name in ("notes.txt", ".unfinished-12345678-results.json"):
        (tmp_path / name).write_text("mine")
    with zoo.ZooWriter(tmp_path) as writer:
        writer.append(SPEC, networks(1), {})
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / ".unfinished-12345678-results.json").read_text()


# -- transactions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["shard", "index"])
def test_a_full_disk_leaves_the_zoo_as_it_was(what, tmp_path):
    """With long metadata the index is the larger file."""
    metadata = {"notes": "x" * (10_000 if what == "index" else 10)}
    count = 4 if what == "index" else 400
    with zoo.ZooWriter(tmp_path, metadata=metadata) as writer:
        writer.append(SPEC, networks(2), {})
        before = files_of(tmp_path)
        with largest_file(9_000), pytest.raises(OSError, match="(shard-00001|index).*(tensors|json)") as caught:
            writer.append(SPEC, networks(count), {})
        assert what in caught.value.filename
        assert files_of(tmp_path) == before
        assert len(writer) == 2
        writer.append(SPEC, networks(count), {})
    opened = zoo.open(tmp_path)
    opened.verify()
    assert len(opened) == 2 + count


@pytest.mark.parametrize("renamed", [0, 1])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_writers_know_what_is_there(renamed, when, folder, monkeypatch):
    """Ctrl-C at either renaming; after that of the index, the networks are in the zoo."""
    calls = iter(range(2))
    replace = os.replace

    def interrupted(*arguments):
        number = next(calls)
        if number == renamed and when == "before":
            raise KeyboardInterrupt
        replace(*arguments)
        if number == renamed:
            raise KeyboardInterrupt

    with zoo.ZooWriter(folder) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                writer.append(SPEC, networks(3, seed=5), labels(3))
        there = renamed == 1 and when == "after"
        assert len(writer) == len(zoo.open(folder)) == (12 if there else 9)
        assert len(list(folder.glob("shard-*"))) == (4 if there else 3)
        writer.append(SPEC, networks(1, seed=6), labels(1))
    opened = zoo.open(folder)
    opened.verify()
    assert len(opened) == len(writer)
    assert_equal_trees(opened[-1].params, take(networks(1, seed=6), 0))


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def run(mode, folder):
    command = [sys.executable, zoo_processes.__file__, mode, str(folder)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    if result.returncode:
        pytest.fail(result.stderr)
    return json.loads(result.stdout)


def test_killed_at_any_moment_a_zoo_is_as_before_or_after_an_append(tmp_path):
    """The processes that are killed check themselves that all is there and that the next writer goes on."""
    results = run("killed", tmp_path)
    lengths = results["lengths"]
    assert results["created"] > 5
    assert len(lengths) > 12
    changes = [after - before for before, after in lengths]
    assert set(changes) == {0, 4}
    assert changes == sorted(changes)
    # The last one was not killed; those before it died when all was there.
    assert changes[-2:] == [4, 4]


def test_many_read_while_one_writes(tmp_path):
    assert run("share", tmp_path)["codes"] == [0, 0, 0]
    opened = zoo.open(tmp_path)
    opened.verify()
    assert zoo_processes.is_numbered(opened, np.arange(93))


def test_one_writer_at_a_time_and_none_after_its_death(folder):
    with zoo.ZooWriter(folder) as writer:
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on") as caught, zoo.ZooWriter(folder):
            pass
        assert caught.value.filename == str(folder)
        writer.append(SPEC, networks(1), labels(1))
    new = folder.parent / "new"
    command = [sys.executable, zoo_processes.__file__, "hold", str(new)]
    holder = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(BlockingIOError) as caught, zoo.ZooWriter(new):
            pass
        for part in (f"process {holder.pid} on {os.uname().nodename}", "zoo_processes.py hold", str(new)):
            assert part in str(caught.value)
        assert len(zoo.open(new)) == 0  # readers do not wait
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with zoo.ZooWriter(new, metadata=zoo_processes.METADATA) as writer:
        writer.append(SPEC, networks(1), {})


# -- broken folders ---------------------------------------------------------------------------------------------------


def test_there_is_no_zoo(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(FileNotFoundError, match=f"there is no zoo.*{path}"):
            zoo.open(path)


def test_a_missing_shard_is_named(folder):
    (folder / "shard-00001.safetensors").unlink()
    for use in (zoo.open, lambda path: zoo.ZooWriter(path).__enter__()):
        with pytest.raises(FileNotFoundError, match="missing.*shard-00001"):
            use(folder)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_shard_cut_short_is_named(length, folder):
    path = folder / "shard-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:length])
    with pytest.raises(ValueError, match=rf"shard-00001.*expected {len(content)} bytes, found {len(content[:length])}"):
        zoo.open(folder)
    # An index that says so too is not believed.
    edit(folder, lambda index: index["shards"][1].update(bytes=len(content[:length])))
    with pytest.raises(ValueError, match="shard-00001"):
        zoo.open(folder)


def test_shards_without_their_index_are_not_replaced(folder):
    (folder / "index.json").unlink()
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"shards of a zoo without its index"), zoo.ZooWriter(folder):
        pass
    assert files_of(folder) == before


def edit(folder, change):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def put(*path, value):
    def change(index):
        functools.reduce(lambda item, key: item[key], path[:-1], index)[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", value="ngjax.model"), "it has no format 'ngjax.zoo'"),
        (put("version", value=2), "format version 2; this library reads version 1"),
        (put("shards", value=None), "'shards': expected a list, received None"),
        (put("shards", 1, value=[]), r"shard 1: 'file': expected a text, received None"),
        (put("shards", 1, "file", value="../shard-00001.safetensors"), "shard 1: expected the file shard-00001"),
        (
            put("shards", 1, "file", value="shard-00000.safetensors"),
            "expected the file shard-00001.*received 'shard-000",
        ),
        (put("shards", 1, "rows", value=-3), "shard 1: 'rows': expected a whole number, received -3"),
        (put("shards", 1, "rows", value=True), "shard 1: 'rows': expected a whole number, received True"),
        (put("shards", 1, "rows", value=3.0), "shard 1: 'rows': expected a whole number, received 3.0"),
        (put("shards", 1, "rows", value=0), "shard 1: expected rows.* received 0 rows"),
        (
            put("shards", 1, "rows", value=2),
            r"shard-00001.*layer_0/bias: expected float32\[2, 5\], found float32\[3, 5\]",
        ),
        (put("shards", 1, "rows", value=2**70), r"shard-00001.*expected float32\[1180591620717411303424, 5\]"),
        (put("shards", 1, "spec", value=0), r"shard-00001.*layer_0/bias: expected float32\[3, 3\], found"),
        (put("shards", 1, "spec", value=2), "shard 1: expected .* one of 2 specs.* received .*spec 2"),
        (put("shards", 1, "spec", value=-1), "shard 1: 'spec': expected a whole number, received -1"),
        (put("shards", 1, "provenance", value=1), "one of 1 provenance"),
        (put("shards", 1, "bytes", value=10), "shard-00001.*expected 10 bytes"),
        (put("shards", 1, "bytes", value=2**70), "shard-00001.*expected 1180591620717411303424 bytes"),
        (put("shards", 1, "sha256", value=3), "shard 1: 'sha256': expected a text"),
        (put("provenance", value=[3]), "'provenance': expected objects"),
        (put("metadata", value=[]), "'metadata': expected an object"),
        (put("labels", "digit", value="int32"), r"shard-00000.*labels/digit: expected int32\[4\], found none"),
        (put("labels", value={"split": "int8"}), "shard-00000.*labels/(label|psnr): expected none, found"),
        (put("labels", "label", value="int64"), r"labels/label: expected int64\[4\], found int32\[4\]"),
        (put("labels", "label", value="object"), "label 'label': unknown dtype 'object'"),
        (put("labels", "label", value=["int32"]), "label 'label': unknown dtype"),
        (put("categories", "split", value="train"), "'split': expected a list, received 'train'"),
        (put("categories", "split", value=[1]), "'split': expected a list of names"),
        (put("categories", "psnr", value=["a"]), "'psnr' is no label of integers"),
        (put("categories", "colour", value=["a"]), "'colour' is no label of integers"),
        (put("specs", 1, value={}), "index.json: spec 1: not a spec"),
        (put("specs", 1, "params", 0, "shape", value=[-5]), "index.json: spec 1: "),
        (put("specs", 1, "params", 0, "path", value=[3]), "index.json: spec 1: "),
        (put("specs", 1, "edge_groups", 0, "view", "splits", value=[["a"], [5]]), "index.json: spec 1: "),
    ],
)
def test_a_wrong_index_is_refused(change, message, folder):
    edit(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        zoo.open(folder)
    assert str(folder) in str(caught.value)
    before = files_of(folder)
    with pytest.raises(ValueError, match=message), zoo.ZooWriter(folder):
        pass
    assert files_of(folder) == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null", b'{"a": 1}'])
def test_files_that_are_no_index(content, folder):
    (folder / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json is not the index of a zoo"):
        zoo.open(folder)


def forge(folder, header, data, length=None):
    """Replaces the last shard by a file of this header and data, with an index that knows its size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = (len(text) if length is None else length).to_bytes(8, "little") + text + data
    (folder / "shard-00002.safetensors").write_bytes(content)
    edit(folder, lambda index: index["shards"][2].update(bytes=len(content)))


def true_header(folder):
    content = (folder / "shard-00002.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_tensor(name, **changes):
    def change(header):
        header[name] |= changes
        return header

    return change


BIAS = "params/layer_1/bias"  # the last of the tensors of four bytes but for labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_tensor(BIAS, data_offsets=[10**6, 10**6 + 8]), "overlap, leave gaps or do not fit into the file"),
        (with_tensor(BIAS, data_offsets=[-16, -8]), "overlap, leave gaps or do not fit into the file"),
        (with_tensor(BIAS, data_offsets=[0, 8]), "overlap, leave gaps"),
        (with_tensor(BIAS, data_offsets=[8, 0]), f"tensor {BIAS} does not fit its place"),
        (with_tensor(BIAS, data_offsets=[0, 4]), f"tensor {BIAS} does not fit its place"),
        (with_tensor(BIAS, data_offsets=[0.5, 8.5]), "broken header"),
        (with_tensor(BIAS, data_offsets=[1, 9]), "not aligned"),
        (with_tensor(BIAS, data_offsets=[2**70, 2**70 + 8]), "overlap, leave gaps"),
        (with_tensor(BIAS, data_offsets=[0]), "broken header"),
        (with_tensor(BIAS, shape=[-2, -1]), f"tensor {BIAS} does not fit its place"),
        (with_tensor(BIAS, shape=[2, 2]), f"tensor {BIAS} does not fit its place"),
        (with_tensor(BIAS, shape="21"), "broken header"),
        (with_tensor(BIAS, dtype="I32"), r"layer_1/bias: expected float32\[2, 1\], found int32\[2, 1\]"),
        (with_tensor(BIAS, dtype="C64"), "broken header: 'C64'"),
        (with_tensor(BIAS, shape=[1, 2]), r"expected float32\[2, 1\], found float32\[1, 2\]"),
        (lambda header: {name: item for name, item in header.items() if name != BIAS}, "leave gaps"),
        (lambda header: [header], "broken header"),
        (lambda header: {**header, BIAS: 3}, "broken header"),
        (lambda header: {**header, "params/new": header[BIAS]}, "overlap"),
        (
            lambda header: {**header, "new": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
            "new: expected none",
        ),
        (lambda header: b"{" * 100, "broken header"),
        (lambda header: b"[" * 100_000, "broken header"),
        (lambda header: b"\xff" * 100, "broken header"),
        (lambda header: b"", "broken header"),
    ],
)
def test_a_broken_header_is_refused(change, message, folder):
    header, data = true_header(folder)
    forge(folder, change(header), data)
    with pytest.raises(ValueError, match=f"shard-00002.*{message}"):
        zoo.open(folder)


def test_headers_of_any_length_are_refused(folder):
    header, data = true_header(folder)
    for length in (0, 1, 10**6, 2**63, 2**64 - 1, len(json.dumps(header)) + len(data) + 8):
        forge(folder, header, data, length)
        with pytest.raises(ValueError, match="shard-00002.*(not a whole safetensors file|broken header)"):
            zoo.open(folder)


def test_a_header_with_any_byte_changed_is_refused_or_means_the_same(folder):
    path = folder / "shard-00002.safetensors"
    content = path.read_bytes()
    refused = 0
    for place in range(0, 8 + int.from_bytes(content[:8], "little"), 17):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        opened, message = open_or_message(folder)
        if opened is None:
            assert path.name in message
            refused += 1
        else:
            opened.read([7, 8])
            with pytest.raises(ValueError, match="is not the file that was written"):
                opened.verify()
    assert refused > 20


def open_or_message(folder):
    try:
        return zoo.open(folder), ""
    except ValueError as error:
        return None, str(error)


def test_verify_finds_any_change(folder):
    zoo.open(folder).verify()
    path = folder / "shard-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    opened = zoo.open(folder)
    with pytest.raises(ValueError, match="shard-00001.* is not the file that was written: expected SHA-256"):
        opened.verify()


def test_verify_names_the_network(folder):
    path = folder / "shard-00002.safetensors"
    for name, place, value, message in (
        ("params/layer_0/kernel", (1, 0, 2), np.nan, "network 8: layer_0/kernel has values that are not finite"),
        ("labels/split", 0, 3, "network 7: label 'split' is no code of train, validation, test"),
    ):
        original = path.read_bytes()
        tensors = {key: array.copy() for key, array in safetensors.numpy.load(original).items()}
        tensors[name][place] = value
        path.write_bytes(safetensors.numpy.save(tensors))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        edit(folder, lambda index, digest=digest: index["shards"][2].update(sha256=digest))
        with pytest.raises(ValueError, match=f"shard-00002.*{message}"):
            zoo.open(folder).verify()
        path.write_bytes(original)
