"""Reads published zoos of image SIRENs from the archives they are distributed in, and converts them into a zoo.

* The zoos of MNIST and Fashion-MNIST of Navon et al. 2023 (DWSNets, arXiv 2301.12780): `mnist-inrs.zip` and
  `fmnist_inrs.zip`.
* Those of MNIST, Fashion-MNIST and CIFAR-10 of Zhou et al. 2023 (NFN, arXiv 2302.14040): `siren_mnist_wts.tar`,
  `siren_fashion_wts.tar` and `siren_cifar_wts.tar`, with more networks (views) per image for training.

Each network is a checkpoint of torch, read without torch and without running anything (see `ngjax.torch_file`), from
the archive itself or from the folder that was unpacked from it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from ngjax.chains import mlp_spec
from ngjax.torch_file import load_torch_file
from ngjax.version import __version__
from ngjax.zoo.archives import Files, open_files
from ngjax.zoo.images import IMAGE_SETS
from ngjax.zoo.store import ZooWriter

SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {"train": "train", "val": "validation", "test": "test"}  # in split files
_OMEGA = 30.0
_SPLIT_POINTS = (45_000, 50_000)
_VALIDATION = 5_000
_SHARD_NETWORKS = 4096
_SHARD_BYTES = 2**26
_NETWORK_LIMIT = 2**26
_SPLITS_LIMIT = 2**28


class PublishedZoo(NamedTuple):
    """How a published zoo is laid out.

    Attributes:
      title: what it is.
      archive: the name of its archive.
      images: the data set its networks draw, one of `ngjax.zoo.IMAGE_SETS`.
      family: whose layout it has: names of files and parameters, splits.
      pattern: the end of a network's name in the archive, and what it says about the network.
      parts: how many parts of a network's path make up that end.
      output_offset: added to the output of the networks, see `ngjax.zoo.apply_siren`.
      pixel_range: what networks give, with the offset, for pixels of 0 and of 1.
      row_first: whether the first input of its networks is the row of a pixel and the second one the column. Those of
        this library take the column first, see `ngjax.zoo.image_coordinates`.
    """

    title: str
    archive: str
    images: str
    family: str
    pattern: str
    parts: int
    output_offset: float
    pixel_range: tuple[float, float]
    row_first: bool


_NFN_PATTERN = r"randinit_smaller_(?:aug(?P<aug>\d+)_)?(?P<label>\d)s/net(?P<image>\d+)\.pth"

PUBLISHED_ZOOS: dict[str, PublishedZoo] = {
    "dwsnets_mnist": PublishedZoo(
        title="MNIST INRs of DWSNets (Navon et al. 2023)",
        archive="mnist-inrs.zip",
        images="mnist",
        family="dwsnets",
        pattern=r"mnist_png_(?P<of>train|test)ing_(?P<label>\d)_(?P<image>\d+)/[^/]+/[^/]+\.pth",
        parts=3,
        output_offset=0.5,
        pixel_range=(0.0, 1.0),
        row_first=False,
    ),
    "dwsnets_fashion_mnist": PublishedZoo(
        title="Fashion-MNIST INRs of DWSNets (Navon et al. 2023)",
        archive="fmnist_inrs.zip",
        images="fashion_mnist",
        family="dwsnets",
        pattern=r"(?P<of>train|test)/model_(?P<image>\d+)\.pth",
        parts=2,
        output_offset=0.5,
        pixel_range=(0.0, 1.0),
        row_first=False,
    ),
    "nfn_mnist": PublishedZoo(
        title="MNIST SIRENs of NFN (Zhou et al. 2023)",
        archive="siren_mnist_wts.tar",
        images="mnist",
        family="nfn",
        pattern=_NFN_PATTERN,
        parts=2,
        output_offset=0.0,
        pixel_range=(-1.0, 1.0),
        row_first=True,
    ),
    "nfn_fashion_mnist": PublishedZoo(
        title="Fashion-MNIST SIRENs of NFN (Zhou et al. 2023)",
        archive="siren_fashion_wts.tar",
        images="fashion_mnist",
        family="nfn",
        pattern=_NFN_PATTERN,
        parts=2,
        output_offset=0.0,
        pixel_range=(-1.0, 1.0),
        row_first=True,
    ),
    "nfn_cifar10": PublishedZoo(
        title="CIFAR-10 SIRENs of NFN (Zhou et al. 2023)",
        archive="siren_cifar_wts.tar",
        images="cifar10",
        family="nfn",
        pattern=_NFN_PATTERN,
        parts=2,
        output_offset=0.0,
        pixel_range=(-1.0, 1.0),
        row_first=True,
    ),
}
"""The zoos that `convert_published` reads, by name."""


class Conversion(NamedTuple):
    """What `convert_published` did.

    Attributes:
      networks: in the zoo now.
      converted: how many of them by this call; the others were there before.
      left_out: checkpoints in the archive that are not in the zoo, by the reason.
    """

    networks: int
    converted: int
    left_out: dict[str, list[str]]


class _Plan(NamedTuple):
    """Networks in the order of conversion. Arrays `[N]`; a label of -1 is in the network's own file."""

    names: list[str]
    labels: Int[np.ndarray, " N"]
    images: Int[np.ndarray, " N"]
    views: Int[np.ndarray, " N"]
    splits: Int[np.ndarray, " N"]


def convert_published(
    name: str,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    splits: str | os.PathLike[str] | None = None,
    validation: int | None = None,
    seed: int | None = None,
    split_points: tuple[int, int] | None = None,
    views: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Writes the networks of a published zoo into a zoo of this library; continues one that it was killed in.

    The networks have the labels `label` (class), `image` (number of the image), `view` (which of several networks of
    one image; 0 is the original one of NFN, i + 1 its augmentation i) and `split`. Images are numbered within the
    training or the test images of their data set; in the zoos of NFN, as by their authors, through both, first the
    training images. What else there is to know, such as `omega` and `output_offset`, is in the zoo's metadata.
    The networks of NFN take the row of a pixel before the column; the rows of their first kernel are exchanged, so that
    they too draw upright with `ngjax.zoo.render`.
    Networks come by split (train, validation, test), view and image.

    Args:
      name: one of `PUBLISHED_ZOOS`.
      source: the archive, or a folder with the files that were in it.
      out: folder of the zoo.
      splits: DWSNets: a JSON file `{"train": {"path": [...], "label": [...]}, "val": ..., "test": ...}`. Networks that
        it does not name are left out. By default that in the archive, which that of MNIST does not have: there, test
        networks are those of test images, and validation networks are drawn.
      validation: DWSNets MNIST without `splits`: how many training images to draw for validation, by default 5,000:
        the first ones of `numpy.random.default_rng(seed).permutation`, applied to the images in the order of their
        numbers.
      seed: of that draw, by default 0.
      split_points: NFN: the first image for validation and the first one for testing, by default 45,000 and 50,000
        for every data set, as in the authors' classification experiments.
      views: NFN: how many views per image to convert at most, by default all. 1 leaves augmentations out.
      progress: called with the numbers of networks in the zoo and of all, before the first and after each shard.

    Raises:
      ValueError: arguments that do not apply; an archive that is broken, has other content or an unsafe pickle;
        networks that do not fit together. The message names archive and member. Or `out` holds another zoo.
      FileNotFoundError: there is no such archive or split file.
      BlockingIOError: another process is writing to this zoo.
    """
    if name not in PUBLISHED_ZOOS:
        raise ValueError(f"name={name!r}, expected one of {', '.join(PUBLISHED_ZOOS)}")
    published = PUBLISHED_ZOOS[name]
    image_set = IMAGE_SETS[published.images]
    _check_options(name, splits=splits, validation=validation, seed=seed, split_points=split_points, views=views)
    with open_files(source) as files:
        if published.family == "nfn":
            plan, left_out = _plan_nfn(published, files, split_points or _SPLIT_POINTS, views)
            rule: dict[str, Any] = {"rule": "split points", "points": list(split_points or _SPLIT_POINTS)}
        else:
            found = _find(published, files)
            for member, match in found.names.items():
                _check_image(files, member, int(match["image"]), image_set.num_images[match["of"] == "test"])
            rule, assigned = _read_or_draw_splits(name, published, files, found, splits, validation, seed or 0)
            plan, left_out = _plan_dwsnets(files, found, assigned)
        if not plan.names:
            raise ValueError(f"{files.path}: none of the networks is left, expected some")
        # Every network has to have the architecture of the first.
        sizes = _sizes(_read_layers(published, files, plan.names[0]).layers)
        shard = max(
            1, min(_SHARD_NETWORKS, _SHARD_BYTES // (4 * sum((a + 1) * b for a, b in itertools.pairwise(sizes))))
        )
        provenance = {"published": published.title, "source": files.fingerprint()}
        metadata = {
            **provenance,
            "images": published.images,
            "image_shape": image_set.image_shape,
            "class_names": image_set.class_names,
            "image_numbers": "training images, then test images" if published.family == "nfn" else "by data set split",
            "splits": {split: int(np.sum((plan.splits == i) & (plan.views == 0))) for i, split in enumerate(SPLITS)},
            "split_rule": rule,
            "views": int(plan.views.max()) + 1,
            "sizes": [sizes],
            "omega": _OMEGA,
            "output_offset": published.output_offset,
            "pixel_range": published.pixel_range,
            "inputs": "column, row" + (" (exchanged: as published row, column)" if published.row_first else ""),
            "shard": shard,
        }
        provenance["converter"] = f"ngjax {__version__}"
        with ZooWriter(out, metadata=metadata, categories={"split": SPLITS}, provenance=provenance) as writer:
            before = len(writer)
            if progress is not None:
                progress(before, len(plan.names))
            for start in range(before, len(plan.names), shard):
                _convert_shard(published, files, plan, slice(start, start + shard), sizes, writer)
                if progress is not None:
                    progress(len(writer), len(plan.names))
            return Conversion(len(writer), len(writer) - before, left_out)


def _check_options(name: str, **options: object) -> None:
    allowed = {
        "dwsnets_mnist": {"splits", "validation", "seed"},
        "dwsnets_fashion_mnist": {"splits"},
    }.get(name, {"split_points", "views"})
    given = {option for option, value in options.items() if value is not None}
    if given - allowed:
        raise ValueError(
            f"{', '.join(sorted(given - allowed))} cannot be given for {name}, only {', '.join(sorted(allowed))}"
        )
    if "splits" in given and given & {"validation", "seed"}:
        raise ValueError(
            "splits names the networks for validation; validation and seed, which draw them, cannot be given"
        )
    points, views, validation = options["split_points"], options["views"], options["validation"]
    if isinstance(points, tuple) and not 0 < points[0] < points[1]:
        raise ValueError(f"split_points={points}, expected two rising numbers of images")
    if isinstance(views, int) and views < 1:
        raise ValueError(f"views={views}, expected at least 1")
    if isinstance(validation, int) and validation < 0:
        raise ValueError(f"validation={validation}, expected a number of images")


# -- which networks there are -----------------------------------------------------------------------------------------


class _Assigned(NamedTuple):
    """The number of the split, and the label if the split file names one, else -1."""

    split: int
    label: int


class _Found(NamedTuple):
    """Checkpoints of the zoo's layout with what their names say, and those of another."""

    names: dict[str, re.Match[str]]
    other: list[str]


def _find(published: PublishedZoo, files: Files) -> _Found:
    pattern = re.compile(rf"(?:.*/)?{published.pattern}", re.ASCII)
    names, other = {}, []
    for name in files.names:
        # Archives made on a Mac hold a second file of this kind for each.
        if not name.endswith(".pth") or name.rpartition("/")[2].startswith("._"):
            continue
        match = pattern.fullmatch(name)
        if match:
            names[name] = match
        else:
            other.append(name)
    if not names:
        example = f"; there is {other[0]}" if other else ""
        raise ValueError(
            f"{files.path} does not hold the {published.title}: expected files named like {published.pattern}, "
            f"found none{example}"
        )
    return _Found(names, other)


def _check_image(files: Files, name: str, image: int, num_images: int) -> None:
    if image >= num_images:
        raise ValueError(f"{files.path}, member {name}: expected an image below {num_images}, found {image}")


def _check_unique(files: Files, names: Sequence[str], keys: Sequence[tuple[int, ...]]) -> None:
    first: dict[tuple[int, ...], str] = {}
    for name, key in zip(names, keys, strict=True):
        if key in first:
            raise ValueError(f"{files.path}: {first[key]} and {name} are both networks of one image and view")
        first[key] = name


def _make_plan(rows: list[tuple[int, int, int, int, str]]) -> _Plan:
    """From (split, view, image, label, name) in any order."""
    rows.sort()
    *columns, names = zip(*rows, strict=True) if rows else ((),) * 5
    split, view, image, label = (np.asarray(column, np.int32) for column in columns)
    return _Plan(list(names), label, image, view, split)


def _plan_nfn(
    published: PublishedZoo, files: Files, split_points: tuple[int, int], views: int | None
) -> tuple[_Plan, dict[str, list[str]]]:
    found = _find(published, files)
    num_images = sum(IMAGE_SETS[published.images].num_images)
    left_out: dict[str, list[str]] = {"of another layout": found.other, "augmented, not for training": []}
    rows, keys = [], []
    labels: dict[int, tuple[int, str]] = {}
    for name, match in found.names.items():
        image, label = int(match["image"]), int(match["label"])
        view = 0 if match["aug"] is None else int(match["aug"]) + 1
        split = sum(image >= point for point in split_points)
        _check_image(files, name, image, num_images)
        keys.append((view, image))
        if labels.setdefault(image, (label, name))[0] != label:
            raise ValueError(f"{files.path}: {labels[image][1]} and {name} have different labels for image {image}")
        if view and split:
            # The authors draw them from the training images alone.
            left_out["augmented, not for training"].append(name)
        elif views is not None and view >= views:
            left_out.setdefault("of further views", []).append(name)
        else:
            rows.append((split, view, image, label, name))
    _check_unique(files, list(found.names), keys)
    return _make_plan(rows), {reason: names for reason, names in left_out.items() if names}


def _plan_dwsnets(files: Files, found: _Found, assigned: Mapping[str, _Assigned]) -> tuple[_Plan, dict[str, list[str]]]:
    keys = [(match["of"] == "test", int(match["image"])) for match in found.names.values()]
    _check_unique(files, list(found.names), keys)
    rows = []
    for name, (split, label) in assigned.items():
        match = found.names[name]
        rows.append((split, 0, int(match["image"]), int(match.groupdict().get("label", label)), name))
    left_out = {
        "of another layout": found.other,
        "not in the split file": [name for name in found.names if name not in assigned],
    }
    return _make_plan(rows), {reason: names for reason, names in left_out.items() if names}


def _read_or_draw_splits(
    name: str,
    published: PublishedZoo,
    files: Files,
    found: _Found,
    path: str | os.PathLike[str] | None,
    validation: int | None,
    seed: int,
) -> tuple[dict[str, Any], dict[str, _Assigned]]:
    """The rule, for the metadata, and the split of each network, by name."""
    if path is None and name == "dwsnets_mnist":
        number = _VALIDATION if validation is None else validation
        return {"rule": "drawn", "validation": number, "seed": seed}, _draw_splits(files, found, number, seed)
    if path is None:
        inside = [member for member in files.names if member.rpartition("/")[2] == "splits.json"]
        if len(inside) != 1:
            raise ValueError(
                f"{files.path}: expected one split file splits.json, found {', '.join(inside) or 'none'}; "
                "another one can be given as splits"
            )
        content, where, file = (
            files.read(inside[0], limit=_SPLITS_LIMIT),
            f"{files.path}, member {inside[0]}",
            inside[0],
        )
    else:
        content, where, file = pathlib.Path(path).read_bytes(), str(path), pathlib.Path(path).name
    rule = {"rule": "file", "file": file, "sha256": hashlib.sha256(content).hexdigest()}
    return rule, _read_splits(content, where, published, files, found)


def _draw_splits(files: Files, found: _Found, validation: int, seed: int) -> dict[str, _Assigned]:
    of_training = sorted((int(match["image"]), name) for name, match in found.names.items() if match["of"] == "train")
    if validation >= len(of_training):
        raise ValueError(
            f"validation={validation}, expected less than the {len(of_training)} networks of training images in "
            f"{files.path}"
        )
    splits = dict.fromkeys(found.names, _Assigned(SPLITS.index("test"), -1))
    for place, number in enumerate(np.random.default_rng(seed).permutation(len(of_training))):
        split = "validation" if place < validation else "train"
        splits[of_training[number][1]] = _Assigned(SPLITS.index(split), -1)
    return splits


def _read_splits(
    content: bytes, where: str, published: PublishedZoo, files: Files, found: _Found
) -> dict[str, _Assigned]:
    classes = len(IMAGE_SETS[published.images].class_names)
    try:
        listed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not a JSON file: {error}") from None
    if not isinstance(listed, dict) or set(listed) != set(_SPLIT_NAMES):
        raise ValueError(f"{where}: expected an object with {', '.join(_SPLIT_NAMES)}")
    # Paths begin with whatever folder the file was made in.
    by_end = {_end(name, published.parts): name for name in found.names}
    splits: dict[str, _Assigned] = {}
    for key, split in _SPLIT_NAMES.items():
        paths, labels = _listed_paths(listed[key], f"{where}: {key!r}")
        for path, label in zip(paths, labels, strict=True):
            name = by_end.get(_end(path, published.parts))
            if name is None:
                raise ValueError(f"{where}: {key!r} names {path}, which is not in {files.path}")
            if name in splits:
                raise ValueError(f"{where}: {path} is named twice")
            match = found.names[name]
            if (match["of"] == "test") != (split == "test"):
                raise ValueError(f"{where}: {key!r} names {path}, a network of a {match['of']}ing image")
            # The file for MNIST has them as texts.
            if label is not None and str(label) not in map(str, range(classes)):
                raise ValueError(f"{where}: {path} has label {label!r}, expected one below {classes}")
            own = match.groupdict().get("label")
            if own is not None and label is not None and str(label) != own:
                raise ValueError(f"{where}: {path} has label {label!r}, but by its name {own}")
            splits[name] = _Assigned(SPLITS.index(split), -1 if label is None else int(label))
    return splits


def _listed_paths(value: Any, where: str) -> tuple[list[str], list[Any]]:
    """Of `[path, ...]` or `{"path": [...], "label": [...]}`; labels are optional."""
    paths = value.get("path") if isinstance(value, dict) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{where}: expected a list of paths, or an object with one as 'path'")
    labels = value.get("label") if isinstance(value, dict) else None
    if labels is None:
        return paths, [None] * len(paths)
    if not isinstance(labels, list) or len(labels) != len(paths):
        raise ValueError(f"{where}: expected as many labels as paths")
    return paths, labels


def _end(path: str, parts: int) -> str:
    return "/".join(path.split("/")[-parts:])


# -- networks ---------------------------------------------------------------------------------------------------------


class _Layers(NamedTuple):
    layers: list[tuple[np.ndarray, np.ndarray]]  # kernel [in, out] and bias
    label: int | None


def _convert_shard(
    published: PublishedZoo, files: Files, plan: _Plan, rows: slice, sizes: tuple[int, ...], writer: ZooWriter
) -> None:
    networks, labels = [], plan.labels[rows].copy()
    for i, name in enumerate(plan.names[rows]):
        network = _read_layers(published, files, name)
        if _sizes(network.layers) != sizes:
            raise ValueError(
                f"{files.path}, member {name}: expected an architecture of {_dashed(sizes)} like that of "
                f"{plan.names[0]}, found {_dashed(_sizes(network.layers))}"
            )
        networks.append(network.layers)
        if network.label is not None:
            if labels[i] not in (-1, network.label):
                raise ValueError(
                    f"{files.path}, member {name} has label {network.label}, but {labels[i]} in the split file"
                )
            labels[i] = network.label
    params = {
        f"layer_{layer}": {
            "kernel": np.stack([kernel for kernel, _ in one]),
            "bias": np.stack([bias for _, bias in one]),
        }
        for layer, one in enumerate(zip(*networks, strict=True))
    }
    writer.append(
        mlp_spec(sizes, activation="siren"),
        params,
        {"label": labels, "image": plan.images[rows], "view": plan.views[rows], "split": plan.splits[rows]},
    )


def _read_layers(published: PublishedZoo, files: Files, name: str) -> _Layers:
    """A network as kernels `[in, out]` and biases, its shapes checked."""
    where = f"{files.path}, member {name}"
    content = io.BytesIO(files.read(name, limit=_NETWORK_LIMIT))
    state = load_torch_file(content, name=where)
    if not isinstance(state, dict):
        raise ValueError(f"{where}: expected a state_dict, found a {type(state).__name__}")
    label = None
    classes = len(IMAGE_SETS[published.images].class_names)
    if "(?P<label>" not in published.pattern:
        label = state.pop("label", None)
        if isinstance(label, np.ndarray) and label.ndim == 0:
            label = label.item()
        if type(label) is not int or not 0 <= label < classes:
            raise ValueError(f"{where}: expected a label below {classes} under 'label', found {label!r}")
    names = _parameter_names(published.family, len(state) // 2)
    if len(names) < 2 or set(itertools.chain(*names)) != set(state):
        raise ValueError(
            f"{where}: expected parameters named {', '.join(itertools.chain(*_parameter_names(published.family, 3)))}, "
            f"or of another number of layers; found {', '.join(map(str, state)) or 'none'}"
        )
    layers = []
    image_shape = IMAGE_SETS[published.images].image_shape
    inputs = 2
    for weight_name, bias_name in names:
        weight, bias = _parameter(state, weight_name, 2, where), _parameter(state, bias_name, 1, where)
        if weight.shape != (len(bias), inputs) or len(bias) == 0:
            raise ValueError(
                f"{where}: expected {weight_name} of shape [{len(bias)}, {inputs}] between the layer before and "
                f"{bias_name}, found {list(weight.shape)}"
            )
        layers.append((weight.T, bias))
        inputs = len(bias)
    if published.row_first:
        kernel, bias = layers[0]
        layers[0] = (kernel[::-1], bias)
    if inputs != image_shape[-1]:
        raise ValueError(f"{where}: expected {image_shape[-1]} outputs, the channels of an image, found {inputs}")
    return _Layers(layers, label)


def _parameter_names(family: str, count: int) -> list[tuple[str, str]]:
    if family == "dwsnets":
        modules = [f"seq.{layer}" for layer in range(count)]
    else:  # the last layer is linear as a whole
        modules = [f"net.{layer}.linear" for layer in range(count - 1)] + [f"net.{count - 1}"]
    return [(f"{module}.weight", f"{module}.bias") for module in modules]


def _parameter(state: Mapping[str, Any], name: str, dimensions: int, where: str) -> np.ndarray:
    array = state[name]
    if not isinstance(array, np.ndarray) or array.ndim != dimensions or array.dtype != np.float32:
        found = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise ValueError(f"{where}: expected {name} to be float32 with {dimensions} dimensions, found {found}")
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: {name} has values that are not finite")
    return array


def _sizes(layers: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[int, ...]:
    return (len(layers[0][0]), *(len(bias) for _, bias in layers))


def _dashed(sizes: Sequence[int]) -> str:
    return "-".join(map(str, sizes))
