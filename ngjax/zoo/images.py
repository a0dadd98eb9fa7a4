"""Image data sets from files on this machine or downloaded: MNIST, Fashion-MNIST, CIFAR-10, scikit-learn's digits.

MNIST and Fashion-MNIST are read from their IDX files, gzipped or not, CIFAR-10 from its binary version, the archive or
what was unpacked from it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import math
import os
import pathlib
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from ngjax.files import write_atomically
from ngjax.zoo.archives import check_member_name

_DATA_DIR_VARIABLE = "NGJAX_DATA_DIR"
_SPLITS = ("train", "test")
_TIMEOUT_SECONDS = 30.0
_CHUNK_BYTES = 2**18
_GZIP_MAGIC = b"\x1f\x8b"
_BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


class Images(NamedTuple):
    """Images with labels.

    Attributes:
      images: pixel values in [0, 1].
      labels: the class of each image.
      class_names: names of the classes, by label.
    """

    images: Float32[np.ndarray, "N H W C"]
    labels: Int32[np.ndarray, " N"]
    class_names: tuple[str, ...]


class ImageSet(NamedTuple):
    """An image data set and where it comes from.

    Attributes:
      layout: how its files are laid out; `"package"` has none, its images come inside a Python package.
      image_shape: height, width and channels.
      num_images: how many there are for training, and for testing.
      class_names: names of the classes, by label.
      address: of the folder with its files on the web.
      files: MD5 sum of each file, by name. That of an IDX file is of its content before compression, since copies are
        compressed anew.
    """

    layout: Literal["idx", "cifar", "package"]
    image_shape: tuple[int, int, int]
    num_images: tuple[int, int]
    class_names: tuple[str, ...]
    address: str
    files: dict[str, str]


_DIGITS = tuple(str(digit) for digit in range(10))

IMAGE_SETS: dict[str, ImageSet] = {
    # Described at http://yann.lecun.com/exdb/mnist/, which does not serve its files any more.
    "mnist": ImageSet(
        layout="idx",
        image_shape=(28, 28, 1),
        num_images=(60_000, 10_000),
        class_names=_DIGITS,
        address="https://ossci-datasets.s3.amazonaws.com/mnist/",
        files={
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
    ),
    "fashion_mnist": ImageSet(
        layout="idx",
        image_shape=(28, 28, 1),
        num_images=(60_000, 10_000),
        class_names=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        address="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        files={
            "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
            "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
            "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
        },
    ),
    "cifar10": ImageSet(
        layout="cifar",
        image_shape=(32, 32, 3),
        num_images=(50_000, 10_000),
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        address="https://www.cs.toronto.edu/~kriz/",
        files={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d13530"},
    ),
    "digits": ImageSet(
        layout="package",
        image_shape=(8, 8, 1),
        num_images=(1437, 360),
        class_names=_DIGITS,
        address="",
        files={},
    ),
}
"""The data sets that `load_images` knows, by name."""


def load_images(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Images:
    """The images of a data set's training or test split, in the order of its files.

    Files are looked for in `<data_dir>/<name>/`, in `<data_dir>/`, and in the cache folder
    `$XDG_CACHE_HOME/ngjax/images/<name>/` (`~/.cache` without that variable). Otherwise they are downloaded from their
    official address, checked against their hash, and put into the cache folder. `"digits"` need scikit-learn and no
    files; their first 1,437 images are for training, the last 360 for testing.

    Args:
      name: one of `IMAGE_SETS`.
      split: `"train"` or `"test"`.
      data_dir: folder with data sets; by default that of the environment variable `NGJAX_DATA_DIR`, if set.
      progress: called with the numbers of bytes received and of all, while a file is downloaded.

    Raises:
      ValueError: an unknown name or split; a file that is cut short or not what its name says, or a download with the
        wrong hash. The message names the file.
      FileNotFoundError: the files are on this machine nowhere and cannot be downloaded. The message names the address
        and where to put them.
      ImportError: `"digits"` without scikit-learn.
    """
    if name not in IMAGE_SETS:
        raise ValueError(f"name={name!r}, expected one of {', '.join(IMAGE_SETS)}")
    if split not in _SPLITS:
        raise ValueError(f"split={split!r}, expected one of {', '.join(_SPLITS)}")
    image_set = IMAGE_SETS[name]
    if image_set.layout == "package":
        return _load_digits_split(split)
    folders = _data_folders(name, data_dir)
    if image_set.layout == "idx":
        pixels, labels = _load_idx(name, split, folders, progress)
    else:
        pixels, labels = _load_cifar(name, split, folders, progress)
    return Images(np.divide(pixels, np.float32(255)), labels.astype(np.int32), image_set.class_names)


def _load_digits_split(split: str) -> Images:
    from ngjax.zoo.digits import load_digits  # which takes `Images` from here

    digits = load_digits()
    num_train, _ = IMAGE_SETS["digits"].num_images
    rows = slice(None, num_train) if split == "train" else slice(num_train, None)
    return digits._replace(images=digits.images[rows], labels=digits.labels[rows])


# -- where files are --------------------------------------------------------------------------------------------------


def _data_folders(name: str, data_dir: str | os.PathLike[str] | None) -> list[pathlib.Path]:
    """Where files of a data set may be, best first. The last one is the cache folder."""
    folders = []
    given = os.environ.get(_DATA_DIR_VARIABLE) or None if data_dir is None else data_dir
    if given is not None:
        folder = pathlib.Path(given).expanduser()
        if not folder.is_dir():
            what = f"data_dir={os.fspath(given)!r}" if data_dir is not None else f"{_DATA_DIR_VARIABLE}={given}"
            raise FileNotFoundError(f"{what} is not a folder")
        folders += [folder / name, folder]
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return [*folders, pathlib.Path(cache) / "ngjax" / "images" / name]


def _find_all(folder: pathlib.Path, choices: Sequence[tuple[str, ...]]) -> list[pathlib.Path] | None:
    """One file for each of `choices`, its alternative names, or None if the folder holds none of them.

    Raises:
      FileNotFoundError: it holds some but not all. Those of another copy might not belong to them.
    """
    found = [next((folder / name for name in names if (folder / name).is_file()), None) for names in choices]
    missing = [names[0] for names, path in zip(choices, found, strict=True) if path is None]
    if len(missing) == len(choices):
        return None
    if missing:
        present = next(path for path in found if path is not None)
        raise FileNotFoundError(f"{folder} holds {present.name} but not {', '.join(missing)}, which belongs to it")
    return [path for path in found if path is not None]


def _fetch(
    name: str, file: str, folders: list[pathlib.Path], progress: Callable[[int, int], None] | None
) -> pathlib.Path:
    """Downloads a file of a data set into the cache folder, where it appears once its hash is right."""
    image_set = IMAGE_SETS[name]
    compressed = image_set.layout == "idx"
    address = f"{image_set.address}{file}{'.gz' if compressed else ''}"
    folder = folders[-1]
    path = folder / address.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as unfinished:
        try:
            with unfinished.open("wb") as output:
                for chunk in _download(address, progress):
                    output.write(chunk)
        except _DownloadError as error:
            looked = ", ".join(str(folder) for folder in folders)
            raise FileNotFoundError(
                f"{path.name} of {name} is in none of the folders {looked}, and downloading it from {address} failed: "
                f"{error}. Download it by other means and put it into {folder}, or into a folder {name} inside one "
                f"that data_dir or the environment variable {_DATA_DIR_VARIABLE} names"
            ) from error
        expected, received = image_set.files[file], _md5(unfinished, compressed=compressed)
        if received != expected:
            what = "its content before compression" if compressed else "it"
            raise ValueError(
                f"{address} was downloaded and thrown away: the MD5 sum of {what} is {received}, expected {expected}"
            )
    return path


class _DownloadError(Exception):
    pass


def _download(address: str, progress: Callable[[int, int], None] | None) -> Iterator[bytes]:
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "ngjax"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            total = int(response.headers.get("Content-Length", 0))
            done = 0
            while chunk := response.read(_CHUNK_BYTES):
                done += len(chunk)
                yield chunk
                if progress is not None:
                    progress(done, max(done, total))
    except urllib.error.HTTPError as error:
        error.close()
        raise _DownloadError(str(error)) from error
    except urllib.error.URLError as error:
        raise _DownloadError(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _DownloadError(f"{type(error).__name__}: {error}") from error
    if done < total:  # a connection that ends too early reads like the end of the file
        raise _DownloadError(f"the connection ended after {done} of {total} bytes")


def _md5(path: pathlib.Path, *, compressed: bool) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except _BROKEN_GZIP as error:
        return f"that of no whole gzip file ({error})"
    return digest.hexdigest()


# -- IDX --------------------------------------------------------------------------------------------------------------


def _load_idx(
    name: str, split: str, folders: list[pathlib.Path], progress: Callable[[int, int], None] | None
) -> tuple[UInt8[np.ndarray, "N H W C"], UInt8[np.ndarray, " N"]]:
    prefix = "train" if split == "train" else "t10k"
    files = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    choices = [(file, f"{file}.gz") for file in files]
    paths = next(filter(None, (_find_all(folder, choices) for folder in folders[:-1])), None)
    if paths is None:
        # In the cache every file is by itself the right one, whatever became of the others.
        cached = [folders[-1] / f"{file}.gz" for file in files]
        paths = [
            path if path.is_file() else _fetch(name, file, folders, progress)
            for path, file in zip(cached, files, strict=True)
        ]

    pixels, labels = (
        _read_idx(path, name, file, dimensions=dimensions)
        for path, file, dimensions in zip(paths, files, (3, 1), strict=True)
    )
    images_path, labels_path = paths
    image_set = IMAGE_SETS[name]
    if pixels.shape[1:] != image_set.image_shape[:2]:
        raise ValueError(
            f"{images_path}: expected images of {_by(image_set.image_shape[:2])} pixels for {name}, "
            f"found {_by(pixels.shape[1:])}"
        )
    if len(pixels) == 0:
        raise ValueError(f"{images_path}: expected at least one image, found none")
    if len(pixels) != len(labels):
        raise ValueError(f"{images_path} holds {len(pixels)} images but {labels_path} {len(labels)} labels")
    _check_labels(labels, image_set, labels_path)
    return pixels[..., None], labels


def _read_idx(path: pathlib.Path, name: str, file: str, *, dimensions: int) -> UInt8[np.ndarray, "..."]:
    content = _read_whole(path)
    # Files of all these data sets have the same names, so nothing but their content tells when they are mixed up.
    owner = _owner_of(content)
    if owner is not None and owner != (name, file):
        raise ValueError(f"{path} is expected to be {file} of {name}, but has the content of {owner[1]} of {owner[0]}")
    header = 4 + 4 * dimensions
    # Two zeros, a number for unsigned bytes, the number of dimensions; then the dimensions; all big-endian.
    expected_magic = 0x0800 + dimensions
    if len(content) < header:
        raise ValueError(f"{path}: expected an IDX file with a header of {header} bytes, found {len(content)} bytes")
    magic = int.from_bytes(content[:4], "big")
    if magic != expected_magic:
        raise ValueError(
            f"{path}: expected an IDX file with magic number {expected_magic} (unsigned bytes, {dimensions} "
            f"dimension{'s' * (dimensions > 1)}), found {magic}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=dimensions, offset=4))
    if len(content) != header + math.prod(shape):
        raise ValueError(
            f"{path}: expected {header + math.prod(shape)} bytes, as its header says {_by(shape)}, "
            f"found {len(content)}: cut short or not an IDX file"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _owner_of(content: bytes) -> tuple[str, str] | None:
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    for name, image_set in IMAGE_SETS.items():
        for file, md5 in image_set.files.items():
            if md5 == digest:
                return name, file
    return None


def _read_whole(path: pathlib.Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except _BROKEN_GZIP as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


# -- CIFAR-10 ---------------------------------------------------------------------------------------------------------

_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"


def _load_cifar(
    name: str, split: str, folders: list[pathlib.Path], progress: Callable[[int, int], None] | None
) -> tuple[UInt8[np.ndarray, "N H W C"], UInt8[np.ndarray, " N"]]:
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    batches = _find_batches(files, folders)
    if batches is None:
        batches = _read_members(_fetch(name, _CIFAR_ARCHIVE, folders, progress), files)
    # The whole split at once, so that every batch can be dropped as soon as it is copied.
    pixels, labels = zip(*(_split_records(content, IMAGE_SETS[name], where) for where, content in batches), strict=True)
    return np.concatenate(pixels), np.concatenate(labels)


def _find_batches(files: list[str], folders: list[pathlib.Path]) -> Iterator[tuple[str, bytes]] | None:
    for folder in folders:
        paths = _find_all(folder / _CIFAR_FOLDER, [(file,) for file in files])
        if paths is not None:
            return ((str(path), path.read_bytes()) for path in paths)
        if (folder / _CIFAR_ARCHIVE).is_file():
            return _read_members(folder / _CIFAR_ARCHIVE, files)
    return None


def _read_members(path: pathlib.Path, files: list[str]) -> Iterator[tuple[str, bytes]]:
    """The wanted members of the archive, one after the other, nothing unpacked to disk."""
    wanted = [f"{_CIFAR_FOLDER}/{file}" for file in files]
    found: set[str] = set()
    with _tar_errors(path), tarfile.open(path, "r|*") as archive:
        for member in archive:
            check_member_name(path, member.name, found)
            if member.name not in wanted:
                continue
            content: IO[bytes] | None = archive.extractfile(member) if member.isfile() else None
            if content is None:
                raise ValueError(f"{path}: expected member {member.name!r} to be a file")
            found.add(member.name)
            yield f"{path}, member {member.name}", content.read()
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{path}: expected the members {', '.join(wanted)}; not there: {', '.join(missing)}")


@contextlib.contextmanager
def _tar_errors(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, *_BROKEN_GZIP) as error:
        raise ValueError(f"{path} is not a whole tar archive: {error}") from None


def _split_records(
    content: bytes, image_set: ImageSet, where: str
) -> tuple[UInt8[np.ndarray, "N H W C"], UInt8[np.ndarray, " N"]]:
    """A label and three planes of pixels per record: red, green, blue."""
    height, width, channels = image_set.image_shape
    size = 1 + height * width * channels
    if len(content) == 0 or len(content) % size:
        raise ValueError(
            f"{where}: expected a positive multiple of {size} bytes, one label and {_by((height, width))} pixels in "
            f"{channels} colors per image; found {len(content)} bytes"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    _check_labels(records[:, 0], image_set, where)
    return records[:, 1:].reshape(-1, channels, height, width).transpose(0, 2, 3, 1), records[:, 0]


# -- both -------------------------------------------------------------------------------------------------------------


def _check_labels(labels: UInt8[np.ndarray, " N"], image_set: ImageSet, where: str | pathlib.Path) -> None:
    wrong = np.flatnonzero(labels >= len(image_set.class_names))
    if len(wrong):
        raise ValueError(
            f"{where}: expected labels below {len(image_set.class_names)}, found {labels[wrong[0]]} for image "
            f"{wrong[0]}"
        )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
