"""Published zoos: read from small archives in their layouts, converted, and refused where something is wrong."""

import hashlib
import io
import json
import os
import re
import tarfile

import jax
import numpy as np
import pytest

from ngjax import zoo
from ngjax.zoo import apply_siren, convert_published, published, render
from tests.torch_pickles import Call, Global, checkpoint, encrypted
from tests.zoo.published_archives import (
    NFN_IMAGES,
    checkpoint_of,
    dwsnets_state,
    fashion_files,
    fashion_label,
    fashion_layers,
    mnist_files,
    mnist_layers,
    mnist_name,
    network,
    nfn_files,
    nfn_layers,
    nfn_name,
    nfn_state,
    write_folder,
    write_tar,
    write_zip,
)


def converted(tmp_path, name, source, **options):
    convert_published(name, source, tmp_path / "zoo", **options)
    return zoo.open(tmp_path / "zoo")


def rows_of(made):
    """(split, view, image, label) of each network, in order."""
    names = made.categories["split"]
    columns = [made.labels[name].tolist() for name in ("split", "view", "image", "label")]
    return [(names[split], *row) for split, *row in zip(*columns, strict=True)]


def assert_network(made, index, layers):
    params = made[index].params
    assert list(params) == [f"layer_{i}" for i in range(len(layers))]
    if "NFN" in made.metadata["published"]:
        (weight, bias), *rest = layers
        layers = [(weight[:, ::-1], bias), *rest]
    for layer, (weight, bias) in zip(params.values(), layers, strict=True):
        np.testing.assert_array_equal(layer["kernel"], weight.T)
        np.testing.assert_array_equal(layer["bias"], bias)


def by_hand(layers, points, offset):
    """The network as it is written down, in float64: sin(30 (W x + b)), the last layer linear."""
    x = points.T.astype(np.float64)
    for weight, bias in layers[:-1]:
        x = np.sin(30 * (weight.astype(np.float64) @ x + bias[:, None]))
    weight, bias = layers[-1]
    return (weight.astype(np.float64) @ x + bias[:, None]).T + offset


# -- DWSNets, MNIST ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mnist_zip(tmp_path):
    return write_zip(tmp_path / "mnist-inrs.zip", mnist_files(mnist_layers()))


def test_dwsnets_mnist(tmp_path, mnist_zip):
    made = converted(tmp_path, "dwsnets_mnist", mnist_zip, validation=4, seed=3)
    validation = sorted(np.random.default_rng(3).permutation(12)[:4].tolist())
    train = [i for i in range(12) if i not in validation]
    expected = [("train", 0, i, 3 * i % 10) for i in train]
    expected += [("validation", 0, i, 3 * i % 10) for i in validation]
    expected += [("test", 0, i, 3 * i % 10) for i in range(3)]
    assert rows_of(made) == expected
    for index, (split, _, image, label) in enumerate(expected):
        name = mnist_name("test" if split == "test" else "train", label, image)
        assert_network(made, index, mnist_layers()[name])

    metadata = made.metadata
    assert (metadata["images"], metadata["image_shape"], metadata["sizes"]) == ("mnist", [28, 28, 1], [[2, 4, 4, 1]])
    assert (metadata["omega"], metadata["output_offset"], metadata["pixel_range"]) == (30.0, 0.5, [0.0, 1.0])
    assert metadata["splits"] == {"train": 8, "validation": 4, "test": 3}
    assert metadata["split_rule"] == {"rule": "drawn", "validation": 4, "seed": 3}
    content = mnist_zip.read_bytes()
    source = {"file": "mnist-inrs.zip", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert metadata["source"] == source
    assert [entry["source"] for entry in made.provenance] == [source]
    made.verify()


@pytest.mark.parametrize(("name", "offset", "channels"), [("dwsnets_mnist", 0.5, 1), ("nfn_cifar10", 0.0, 3)])
def test_converted_networks_compute_what_is_documented(tmp_path, name, offset, channels):
    layers = network(0, (2, 8, 8, channels))
    if name == "dwsnets_mnist":
        source = write_zip(tmp_path / "a.zip", mnist_files({mnist_name("train", 3, 7): layers}))
        made = converted(tmp_path, name, source, validation=0)
    else:
        made = converted(tmp_path, name, write_tar(tmp_path / "a.tar", nfn_files({nfn_name(3): layers})))
    points = np.random.default_rng(1).uniform(-1, 1, size=(20, 2)).astype(np.float32)
    settings = {key: made.metadata[key] for key in ("omega", "output_offset")}
    values = apply_siren(jax.tree.map(jax.numpy.asarray, made[0].params), jax.numpy.asarray(points), **settings)
    as_published = points[:, ::-1] if name.startswith("nfn") else points
    np.testing.assert_allclose(values, by_hand(layers, as_published, offset), atol=1e-4)
    assert made.metadata["pixel_range"] == ([0.0, 1.0] if offset else [-1.0, 1.0])


def test_checkpoints_that_torch_wrote(tmp_path):
    torch = pytest.importorskip("torch")
    modules = [torch.nn.Linear(fan_in, fan_out) for fan_in, fan_out in ((2, 6), (6, 5), (5, 1))]
    content = io.BytesIO()
    torch.save(torch.nn.ModuleDict({"seq": torch.nn.ModuleList(modules)}).state_dict(), content)
    source = write_zip(tmp_path / "a.zip", {mnist_name("train", 3, 7): content.getvalue()})
    made = converted(tmp_path, "dwsnets_mnist", source, validation=0)
    points = np.random.default_rng(1).uniform(-1, 1, size=(20, 2)).astype(np.float32)
    values = torch.from_numpy(points)
    for module in modules[:-1]:
        values = torch.sin(30 * module(values))
    expected = modules[-1](values).detach().numpy() + 0.5
    params = jax.tree.map(jax.numpy.asarray, made[0].params)
    received = apply_siren(params, jax.numpy.asarray(points), output_offset=made.metadata["output_offset"])
    np.testing.assert_allclose(received, expected, atol=1e-4)


def test_networks_of_nfn_draw_upright(tmp_path):
    """Their authors' grid has the row as the first coordinate."""
    layers = network(0, (2, 8, 8, 1))
    made = converted(tmp_path, "nfn_mnist", write_tar(tmp_path / "a.tar", nfn_files({nfn_name(3): layers})))
    axis = np.linspace(-1, 1, 28)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    drawn = by_hand(layers, grid, 0.0).reshape(28, 28, 1)
    np.testing.assert_allclose(render(jax.tree.map(jax.numpy.asarray, made[0].params), 28, 28), drawn, atol=1e-4)


def test_folders_give_the_networks_of_the_archive(tmp_path, mnist_zip):
    expected = converted(tmp_path, "dwsnets_mnist", mnist_zip, validation=4)
    folder = write_folder(tmp_path / "unpacked", mnist_files(mnist_layers()))
    for number, source in enumerate((folder, folder / "mnist-inrs")):
        made = converted(tmp_path / str(number), "dwsnets_mnist", source, validation=4)
        assert rows_of(made) == rows_of(expected)
        assert jax.tree.all(jax.tree.map(np.array_equal, made.read(range(15)), expected.read(range(15))))
        assert made.metadata["source"]["folder"] == source.name


def test_drawn_split_is_new_for_each_seed_and_independent_of_the_order_in_the_archive(tmp_path, mnist_zip):
    files = mnist_files(mnist_layers())
    backwards = write_zip(tmp_path / "backwards.zip", dict(reversed(files.items())))
    first, same, other = (
        rows_of(converted(tmp_path / str(i), "dwsnets_mnist", source, validation=4, seed=seed))
        for i, (source, seed) in enumerate([(mnist_zip, 0), (backwards, 0), (mnist_zip, 1)])
    )
    assert first == same
    assert first != other


def mnist_splits(layers, **changes):
    """A split file as in the reference code: labels are texts, the order is any."""
    train = [name for name in layers if "training" in name]
    test = [name for name in layers if "testing" in name]
    splits = {"train": train[:2:-1], "val": train[:3], "test": test}
    return {
        key: {"path": [f"dataset/{name}" for name in names], "label": [name.split("_")[3] for name in names]}
        for key, names in splits.items()
    } | changes


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


def test_split_file_for_mnist(tmp_path, mnist_zip):
    splits = write_json(tmp_path / "mnist_splits.json", mnist_splits(mnist_layers()))
    made = converted(tmp_path, "dwsnets_mnist", mnist_zip, splits=splits)
    assert [row[2] for row in rows_of(made)] == [*range(3, 12), *range(3), *range(3)]
    assert made.metadata["splits"] == {"train": 9, "validation": 3, "test": 3}
    digest = hashlib.sha256(splits.read_bytes()).hexdigest()
    assert made.metadata["split_rule"] == {"rule": "file", "file": "mnist_splits.json", "sha256": digest}


def test_networks_that_a_split_file_does_not_name_are_left_out(tmp_path, mnist_zip):
    listed = mnist_splits(mnist_layers())
    listed["train"] = {"path": listed["train"]["path"][:4]}
    splits = write_json(tmp_path / "splits.json", listed)
    conversion = convert_published("dwsnets_mnist", mnist_zip, tmp_path / "zoo", splits=splits)
    assert conversion.networks == conversion.converted == 10
    assert [len(names) for names in conversion.left_out.values()] == [5]
    assert "not in the split file" in conversion.left_out


def first_path(key="train"):
    return mnist_splits(mnist_layers())[key]["path"][0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ([], "expected an object with train, val, test"),
        (mnist_splits({}, more=[]), "expected an object with train, val, test"),
        (mnist_splits({}, val=3), "'val': expected a list of paths"),
        (mnist_splits({}, val={"path": [3]}), "'val': expected a list of paths"),
        (mnist_splits({}, val={"path": [], "label": ["3"]}), "as many labels as paths"),
        (mnist_splits({}, val=["x/y/none.pth"]), "'val' names x/y/none.pth, which is not in .*mnist-inrs.zip"),
        (mnist_splits(mnist_layers(), val=[first_path()]), f"{first_path()} is named twice"),
        (mnist_splits({}, test=[first_path()]), f"'test' names {first_path()}, a network of a training image"),
        (mnist_splits({}, val=[first_path("test")]), "'val' names .*, a network of a testing image"),
        (mnist_splits({}, val={"path": [first_path()], "label": ["9"]}), "has label '9', but by its name 3"),
        (mnist_splits({}, val={"path": [first_path()], "label": ["x"]}), "has label 'x', expected one below 10"),
    ],
)
def test_bad_split_files(tmp_path, mnist_zip, content, message):
    splits = tmp_path / "splits.json"
    splits.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=f"^{splits}.*{message}"):
        convert_published("dwsnets_mnist", mnist_zip, tmp_path / "zoo", splits=splits)
    assert not (tmp_path / "zoo").exists()


# -- DWSNets, Fashion-MNIST -------------------------------------------------------------------------------------------


def test_dwsnets_fashion_mnist(tmp_path):
    layers = fashion_layers()
    source = write_zip(tmp_path / "fmnist_inrs.zip", fashion_files(layers))
    made = converted(tmp_path, "dwsnets_fashion_mnist", source)
    order = (
        [("train", i) for i in range(2, 6)] + [("validation", i) for i in range(2)] + [("test", i) for i in range(3)]
    )
    assert rows_of(made) == [(split, 0, i, i * 7 % 10) for split, i in order]
    for index, (split, image) in enumerate(order):
        of = "test" if split == "test" else "train"
        assert_network(made, index, layers[f"fmnist_inrs/{of}/model_{image}.pth"])
    assert made.metadata["output_offset"] == 0.5
    assert made.metadata["split_rule"]["file"] == "fmnist_inrs/splits.json"


def test_split_file_with_labels_for_fashion_mnist(tmp_path):
    layers = fashion_layers()
    source = write_zip(tmp_path / "fmnist_inrs.zip", fashion_files(layers))
    paths = {"train": list(layers)[:5], "val": list(layers)[5:6], "test": list(layers)[6:]}
    listed = {key: {"path": names, "label": list(map(fashion_label, names))} for key, names in paths.items()}
    made = converted(tmp_path, "dwsnets_fashion_mnist", source, splits=write_json(tmp_path / "s.json", listed))
    assert made.metadata["splits"] == {"train": 5, "validation": 1, "test": 3}

    listed["val"]["label"] = [4]
    splits = write_json(tmp_path / "s.json", listed)
    with pytest.raises(ValueError, match=r"fmnist_inrs/train/model_5.pth has label 5, but 4 in the split file"):
        convert_published("dwsnets_fashion_mnist", source, tmp_path / "other", splits=splits)


@pytest.mark.parametrize("label", [None, 10, -1, "3", True, 2.0])
def test_bad_labels_in_fashion_mnist(tmp_path, label):
    files = fashion_files(fashion_layers())
    name = "fmnist_inrs/train/model_3.pth"
    state = dwsnets_state(network(0))
    files[name] = checkpoint_of(state if label is None else state | {"label": label})
    source = write_zip(tmp_path / "fmnist_inrs.zip", files)
    with pytest.raises(ValueError, match=f"{source}, member {name}: expected a label below 10 .* found {label!r}"):
        convert_published("dwsnets_fashion_mnist", source, tmp_path / "zoo")


def test_labels_that_are_tensors(tmp_path):
    files = fashion_files(fashion_layers())
    files["fmnist_inrs/train/model_3.pth"] = checkpoint_of(dwsnets_state(network(0)) | {"label": np.array(8)})
    made = converted(tmp_path, "dwsnets_fashion_mnist", write_zip(tmp_path / "a.zip", files))
    assert made.labels["label"][made.rows(split="train", image=3)].tolist() == [8]


def test_fashion_mnist_without_its_split_file(tmp_path):
    files = fashion_files(fashion_layers())
    del files["fmnist_inrs/splits.json"]
    source = write_zip(tmp_path / "fmnist_inrs.zip", files)
    with pytest.raises(ValueError, match="expected one split file splits.json, found none"):
        convert_published("dwsnets_fashion_mnist", source, tmp_path / "zoo")


def test_fashion_mnist_with_a_network_missing(tmp_path):
    files = fashion_files(fashion_layers())
    del files["fmnist_inrs/test/model_1.pth"]
    source = write_zip(tmp_path / "fmnist_inrs.zip", files)
    message = f"{source}, member fmnist_inrs/splits.json: 'test' names .*/fmnist_inrs/test/model_1.pth, which is not in"
    with pytest.raises(ValueError, match=message):
        convert_published("dwsnets_fashion_mnist", source, tmp_path / "zoo")


# -- NFN --------------------------------------------------------------------------------------------------------------


def test_nfn_views_are_told_apart(tmp_path):
    """The pattern of the authors' code takes augmented networks for the original ones."""
    layers = nfn_layers()
    made = converted(tmp_path, "nfn_mnist", write_tar(tmp_path / "siren_mnist_wts.tar", nfn_files(layers)))
    splits = ["train"] * 3 + ["validation"] * 2 + ["test"] * 3
    expected = [("train", view, image) for view in range(3) for image in NFN_IMAGES[:3]]
    expected += [(split, 0, image) for split, image in zip(splits[3:], NFN_IMAGES[3:], strict=True)]
    assert rows_of(made) == [(split, view, image, image % 7) for split, view, image in expected]
    for index, (_, view, image) in enumerate(expected):
        assert_network(made, index, layers[nfn_name(image, view)])
    assert made.metadata["views"] == 3
    assert made.metadata["split_rule"] == {"rule": "split points", "points": [45_000, 50_000]}
    assert made.metadata["image_numbers"] == "training images, then test images"


def test_nfn_with_fewer_views_and_other_split_points(tmp_path):
    source = write_tar(tmp_path / "siren_fashion_wts.tar", nfn_files(nfn_layers()))
    options = {"views": 2, "split_points": (1, 50_000)}
    conversion = convert_published("nfn_fashion_mnist", source, tmp_path / "zoo", **options)
    made = zoo.open(tmp_path / "zoo")
    assert rows_of(made)[:2] == [("train", 0, 0, 0), ("train", 1, 0, 0)]
    assert made.metadata["splits"] == {"train": 1, "validation": 4, "test": 3}
    assert made.metadata["images"] == "fashion_mnist"
    # Two augmentations of images that are no longer for training, and the third view of the one that is.
    assert {reason: len(names) for reason, names in conversion.left_out.items()} == {
        "augmented, not for training": 4,
        "of further views": 1,
    }


def test_nfn_in_color(tmp_path):
    layers = {nfn_name(3): network(0, (2, 4, 4, 3))}
    made = converted(tmp_path, "nfn_cifar10", write_tar(tmp_path / "a.tar", nfn_files(layers)))
    assert (made.metadata["images"], made.metadata["image_shape"]) == ("cifar10", [32, 32, 3])
    assert_network(made, 0, layers[nfn_name(3)])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("siren_mnist_wts/randinit_smaller_4s/net3.pth", "have different labels for image 3"),
        ("siren_mnist_wts/randinit_smaller_aug0_4s/net3.pth", "have different labels for image 3"),
        ("elsewhere/randinit_smaller_3s/net3.pth", "are both networks of one image and view"),
        ("siren_mnist_wts/randinit_smaller_3s/net03.pth", "are both networks of one image and view"),
    ],
)
def test_two_networks_of_one_image_in_nfn(tmp_path, second, message):
    source = write_tar(tmp_path / "a.tar", nfn_files({nfn_name(3): network(0), second: network(1)}))
    with pytest.raises(ValueError, match=message) as raised:
        convert_published("nfn_mnist", source, tmp_path / "zoo")
    for part in (str(source), nfn_name(3), second):
        assert part in str(raised.value)


def test_two_networks_of_one_image_in_dwsnets(tmp_path):
    layers = mnist_layers()
    twice = mnist_name("train", 3, 1).replace("/checkpoints/", "/other/")
    source = write_zip(tmp_path / "a.zip", mnist_files(layers | {twice: network(0)}))
    with pytest.raises(ValueError, match="both networks of one image and view"):
        convert_published("dwsnets_mnist", source, tmp_path / "zoo", validation=4)


@pytest.mark.parametrize(
    ("name", "member", "limit"),
    [
        ("dwsnets_mnist", mnist_name("train", 3, 60_000), 60_000),
        ("dwsnets_mnist", mnist_name("test", 3, 10_000), 10_000),
        ("dwsnets_fashion_mnist", "fmnist_inrs/test/model_10000.pth", 10_000),
        ("nfn_mnist", nfn_name(70_000), 70_000),
        ("nfn_cifar10", nfn_name(60_000), 60_000),
        ("nfn_cifar10", nfn_name(2**70), 60_000),
    ],
)
def test_images_that_do_not_exist(tmp_path, name, member, limit):
    source = write_zip(tmp_path / "a.zip", {member: b""})
    with pytest.raises(ValueError, match=f"{source}, member {member}: expected an image below {limit}"):
        convert_published(name, source, tmp_path / "zoo")


# -- all --------------------------------------------------------------------------------------------------------------


def test_other_widths_and_depths(tmp_path):
    layers = {nfn_name(image): network(image, (2, 6, 3, 6, 1)) for image in range(3)}
    made = converted(tmp_path, "nfn_mnist", write_tar(tmp_path / "a.tar", nfn_files(layers)))
    assert made.metadata["sizes"] == [[2, 6, 3, 6, 1]]
    assert_network(made, 2, layers[nfn_name(2)])


def test_other_files_are_left_out_and_named(tmp_path):
    files = nfn_files({nfn_name(0): network(0)}) | {
        "siren_mnist_wts/readme.txt": b"",
        "siren_mnist_wts/randinit_test_3s/net1.pth": b"",
        "siren_mnist_wts/randinit_smaller_0s/._net0.pth": b"of a Mac",
    }
    conversion = convert_published("nfn_mnist", write_tar(tmp_path / "a.tar", files), tmp_path / "zoo")
    assert conversion == (1, 1, {"of another layout": ["siren_mnist_wts/randinit_test_3s/net1.pth"]})


class Killed(Exception):
    pass


def shards_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


@pytest.mark.parametrize("name", ["dwsnets_mnist", "nfn_mnist"])
def test_continues_where_it_was_stopped(tmp_path, monkeypatch, name):
    monkeypatch.setattr(published, "_SHARD_NETWORKS", 4)
    if name == "dwsnets_mnist":
        source = write_zip(tmp_path / "a.zip", mnist_files(mnist_layers()))
        options = {"validation": 4}
    else:
        source, options = write_tar(tmp_path / "a.tar", nfn_files(nfn_layers())), {}
    whole = convert_published(name, source, tmp_path / "whole", **options)

    def kill(done, total):
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        convert_published(name, source, tmp_path / "zoo", progress=kill, **options)
    calls = []
    conversion = convert_published(
        name, source, tmp_path / "zoo", progress=lambda done, total: calls.append((done, total)), **options
    )
    assert (conversion.networks, conversion.converted) == (whole.networks, whole.networks - 8)
    assert calls[0] == (8, whole.networks)
    assert calls[-1] == (whole.networks, whole.networks)
    assert shards_of(tmp_path / "zoo") == shards_of(tmp_path / "whole")
    assert convert_published(name, source, tmp_path / "zoo", **options).converted == 0


def test_does_not_continue_another_conversion(tmp_path, mnist_zip):
    convert_published("dwsnets_mnist", mnist_zip, tmp_path / "zoo", validation=4)
    with pytest.raises(ValueError, match=r"split_rule.seed: 0 in the zoo, received 1"):
        convert_published("dwsnets_mnist", mnist_zip, tmp_path / "zoo", validation=4, seed=1)
    changed = write_zip(mnist_zip, mnist_files(mnist_layers(train=13)))
    with pytest.raises(ValueError, match=r"source.sha256: .* in the zoo"):
        convert_published("dwsnets_mnist", changed, tmp_path / "zoo", validation=4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {}, "name='mnist', expected one of dwsnets_mnist, dwsnets_fashion_mnist, nfn_mnist"),
        ("nfn_mnist", {"seed": 1}, "seed cannot be given for nfn_mnist, only split_points, views"),
        ("nfn_mnist", {"splits": "x.json"}, "splits cannot be given for nfn_mnist"),
        ("dwsnets_mnist", {"views": 1, "split_points": (1, 2)}, "split_points, views cannot be given"),
        ("dwsnets_fashion_mnist", {"validation": 1}, "validation cannot be given for dwsnets_fashion_mnist"),
        ("dwsnets_mnist", {"splits": "x.json", "seed": 1}, "validation and seed, which draw them"),
        ("nfn_mnist", {"views": 0}, "views=0"),
        ("nfn_mnist", {"split_points": (2, 1)}, "two rising numbers"),
        ("dwsnets_mnist", {"validation": -1}, "validation=-1"),
        ("dwsnets_mnist", {"validation": 12}, "validation=12, expected less than the 12 networks of training images"),
        ("dwsnets_mnist", {}, "validation=5000, expected less than the 12"),
    ],
)
def test_bad_options(tmp_path, mnist_zip, name, options, message):
    with pytest.raises(ValueError, match=message):
        convert_published(name, mnist_zip, tmp_path / "zoo", **options)


@pytest.mark.parametrize("name", published.PUBLISHED_ZOOS)
def test_the_archive_of_another_zoo(tmp_path, name):
    other = mnist_files(mnist_layers()) if name.startswith("nfn") else nfn_files(nfn_layers())
    source = write_zip(tmp_path / "a.zip", other)
    with pytest.raises(ValueError, match=f"does not hold the .*{re.escape(min(other))}"):
        convert_published(name, source, tmp_path / "zoo")


# -- what a network may look like -------------------------------------------------------------------------------------


def changed(layers, index, **arrays):
    """A state with the weight or bias of one layer replaced."""
    layers = list(layers)
    layers[index] = (arrays.get("weight", layers[index][0]), arrays.get("bias", layers[index][1]))
    return nfn_state(layers)


GOOD = network(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a whole zip archive"),
        (b"not a checkpoint", "is not a whole zip archive"),
        (checkpoint_of(nfn_state(GOOD))[:-50], "is not a whole zip archive"),
        (
            checkpoint({"x": Call(Global("os", "system"), ("touch executed",))}),
            "asks for .*os.system, which is refused",
        ),
        (checkpoint([1]), "expected a state_dict, found a list"),
        (checkpoint({}), "expected parameters named net.0.linear.weight, .* found none"),
        (checkpoint_of(dwsnets_state(GOOD)), "expected parameters named .* found seq.0.weight"),
        (checkpoint_of(nfn_state(GOOD) | {"net.3.bias": np.zeros(1, np.float32)}), "expected parameters named"),
        (checkpoint_of({"net.0.weight": GOOD[0][0], "net.0.bias": GOOD[0][1]}), "expected parameters named"),
        (checkpoint_of(changed(GOOD, 0, bias=3.0)), "expected net.0.linear.bias to be float32 .* found a float"),
        (checkpoint_of(changed(GOOD, 0, weight=GOOD[0][0].astype(np.float64))), r"found float64\[4, 2\]"),
        (checkpoint_of(changed(GOOD, 0, weight=GOOD[0][0][0])), r"2 dimensions, found float32\[2\]"),
        (
            checkpoint_of(changed(GOOD, 0, weight=GOOD[0][0].T.copy())),
            r"net.0.linear.weight of shape \[4, 2\] .* \[2, 4\]",
        ),
        (checkpoint_of(changed(GOOD, 1, bias=np.zeros(5, np.float32))), r"net.1.linear.weight of shape \[5, 4\]"),
        (
            checkpoint_of(changed(GOOD, 2, bias=np.full(1, np.nan, np.float32))),
            "net.2.bias has values that are not finite",
        ),
        (checkpoint_of(nfn_state(network(0, (2, 4, 4, 3)))), "expected 1 outputs, .* found 3"),
        (checkpoint_of(nfn_state(network(0, (3, 4, 4, 1)))), r"net.0.linear.weight of shape \[4, 2\]"),
        (checkpoint_of(nfn_state(network(0, (2, 5, 4, 1)))), "expected an architecture of 2-4-4-1 .* found 2-5-4-1"),
    ],
)
def test_bad_networks(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    files = nfn_files({nfn_name(0): GOOD, nfn_name(1): GOOD}) | {nfn_name(1): content}
    source = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=f"^{source}, member {nfn_name(1)}.*{message}"):
        convert_published("nfn_mnist", source, tmp_path / "zoo")
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "zoo"]
    assert len(zoo.open(tmp_path / "zoo")) == 0


def test_what_was_converted_before_a_bad_network_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "_SHARD_NETWORKS", 2)
    files = nfn_files({nfn_name(image): network(image) for image in range(5)}) | {nfn_name(3): b""}
    with pytest.raises(ValueError, match=nfn_name(3)):
        convert_published("nfn_mnist", write_tar(tmp_path / "a.tar", files), tmp_path / "zoo")
    assert len(zoo.open(tmp_path / "zoo")) == 2


# -- archives ---------------------------------------------------------------------------------------------------------


def test_missing_archive(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.zip"):
        convert_published("nfn_mnist", tmp_path / "nowhere.zip", tmp_path / "zoo")


@pytest.mark.parametrize("write", [write_zip, write_tar])
@pytest.mark.parametrize("name", ["../../outside.pth", "/etc/outside.pth", "a/../../outside.pth", "a\\..\\outside.pth"])
def test_names_that_point_outside(tmp_path, write, name):
    source = write(tmp_path / "archive", nfn_files({nfn_name(0): GOOD}) | {name: b"x"})
    with pytest.raises(ValueError, match="points outside of the archive") as raised:
        convert_published("nfn_mnist", source, tmp_path / "zoo")
    assert repr(name) in str(raised.value)


def test_encrypted_zip(tmp_path):
    source = write_zip(tmp_path / "a.zip", nfn_files({nfn_name(0): GOOD}))
    source.write_bytes(encrypted(source.read_bytes()))
    with pytest.raises(ValueError, match=f"{source}, member {nfn_name(0)} is encrypted"):
        convert_published("nfn_mnist", source, tmp_path / "zoo")


def test_a_zoo_inside_of_the_folder_it_is_made_from(tmp_path):
    source = write_folder(tmp_path / "data", nfn_files(nfn_layers()))
    first, second = (convert_published("nfn_mnist", source, source / "zoo") for _ in range(2))
    assert (first.converted, second.converted, second.networks) == (14, 0, 14)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_compressed_tar(tmp_path, compression):
    source = write_tar(tmp_path / "a.tar", nfn_files({nfn_name(0): GOOD}), f"w:{compression}")
    with pytest.raises(ValueError, match=f"{source} is compressed with .*: decompress it"):
        convert_published("nfn_mnist", source, tmp_path / "zoo")


def test_cut_archives(tmp_path):
    """At every place, also between two members."""
    files = nfn_files({nfn_name(image): GOOD for image in range(3)})
    whole = write_tar(tmp_path / "whole.tar", files).read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in [*range(0, end, 512), end - 100, end]:
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.tar (is not a whole|.*net\d.pth)"):
            convert_published("nfn_mnist", tmp_path / "cut.tar", tmp_path / "zoo")
    whole = write_zip(tmp_path / "whole.zip", files).read_bytes()
    for length in range(1, len(whole), 701):
        (tmp_path / "cut.zip").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.zip is not a whole"):
            convert_published("nfn_mnist", tmp_path / "cut.zip", tmp_path / "zoo")


def test_broken_header_in_the_middle_of_a_tar(tmp_path):
    content = bytearray(write_tar(tmp_path / "a.tar", nfn_files({nfn_name(i): GOOD for i in range(3)})).read_bytes())
    at = content.find(nfn_name(1).encode())
    content[at + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match="a.tar is not a whole"):
        convert_published("nfn_mnist", tmp_path / "a.tar", tmp_path / "zoo")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_a_tar(tmp_path, kind):
    source = write_tar(tmp_path / "a.tar", nfn_files({nfn_name(0): GOOD}))
    with tarfile.open(source, "a") as archive:
        info = tarfile.TarInfo(nfn_name(1))
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ValueError, match=f"member '{nfn_name(1)}' is a link or a device"):
        convert_published("nfn_mnist", source, tmp_path / "zoo")


def test_members_of_one_name(tmp_path):
    source = write_tar(tmp_path / "a.tar", nfn_files({nfn_name(0): GOOD}))
    with tarfile.open(source, "a") as archive:
        archive.addfile(tarfile.TarInfo(f"./{nfn_name(0)}"))
    with pytest.raises(ValueError, match=f"member '{nfn_name(0)}' is there twice"):
        convert_published("nfn_mnist", source, tmp_path / "zoo")


@pytest.mark.parametrize("write", [write_zip, write_tar, write_folder])
def test_oversized_members(tmp_path, monkeypatch, write):
    """A few kilobytes of a zip archive may claim to be gigabytes."""
    monkeypatch.setattr(published, "_NETWORK_LIMIT", 10_000)
    source = write(tmp_path / "archive", nfn_files({nfn_name(0): GOOD}) | {nfn_name(1): bytes(10_001)})
    with pytest.raises(ValueError, match=f"{nfn_name(1)} has 10001 bytes, expected at most 10000"):
        convert_published("nfn_mnist", source, tmp_path / "zoo")
