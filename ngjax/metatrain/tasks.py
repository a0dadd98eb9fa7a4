"""Tasks: the networks and data on which learned optimizers are meta-trained and evaluated.

A task is static, and its data is an argument of whatever is compiled:

    task, data = find_task("fashion-cnn-16-32-32"), load_task_data("fashion_mnist")
    params = task.init(jax.random.key(0))
    loss = task.loss(params, sample_batch(jax.random.key(1), data.train, task.batch_size))
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import re
import sysconfig
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped, UInt8

from ngjax.metatrain.networks import MLP, ConvNet, Network, Params, Transformer, mean_over_chunks
from ngjax.spec import NeuralGraphSpec
from ngjax.zoo.images import IMAGE_SETS, load_images

# -- data --------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Examples with the right answers.

    Attributes:
      inputs: images `[B, H, W, C]`, whose pixels are counts of ink or light (`uint8`), or tokens `[B, T]`.
      labels: the class of each image `[B]`, or the token that follows each `[B, T]`.
    """

    inputs: Shaped[Array, "B ..."]
    labels: Int[Array, "B ..."]


class TaskData(NamedTuple):
    """The two splits of a data set. Give it to compiled functions as an argument: closed over, it becomes a constant.

    Attributes:
      train: what batches are drawn from.
      test: what a trained network is judged by.
    """

    train: Batch
    test: Batch


class _Pixels(NamedTuple):
    """How pixels of an image set become inputs: `(pixel / full - mean) / deviation`, for each channel."""

    full: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


# Fashion-MNIST is normalized by the numbers of MNIST, as in Kofinas et al. 2024 (arXiv 2403.12143). The digits' own
# pixels are counts up to 16.
_PIXELS = {
    "mnist": _Pixels(255, (0.1307,), (0.3081,)),
    "fashion_mnist": _Pixels(255, (0.1307,), (0.3081,)),
    "cifar10": _Pixels(255, (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "digits": _Pixels(16, (0.3053,), (0.3760,)),
}
_TEXT = "stdlib"
CONTEXT = 64
"""Characters in a row of the text data."""


def load_task_data(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> TaskData:
    """A data set, on the default device.

    Images come from `ngjax.zoo.load_images`. `"stdlib"` is text: 1.5 million characters of the Python standard library
    in windows of 64 that do not overlap, the first 90 % for training. Python's versions differ in it a little.

    Args:
      name: `"mnist"`, `"fashion_mnist"`, `"cifar10"`, `"digits"`, or `"stdlib"`; `"fashion_mnist-7"` for images of
        7 x 7 pixels, each the mean of a square of the original's.
      data_dir: see `ngjax.zoo.load_images`.

    Raises:
      ValueError: an unknown name, or a file that is not what it should be.
      FileNotFoundError: files that are not on this machine and cannot be had; the message says where they may be put.
      ImportError: `"digits"` without scikit-learn.
    """
    if name == _TEXT:
        return text_data(standard_library_text())
    base, _, side = name.partition("-")
    if base not in _PIXELS:
        raise ValueError(f"name={name!r}, expected one of {', '.join([*_PIXELS, _TEXT])}")
    return TaskData(*(_load_split(base, split, int(side) if side else None, data_dir) for split in ("train", "test")))


def _load_split(name: str, split: str, side: int | None, data_dir: str | os.PathLike[str] | None) -> Batch:
    loaded = load_images(name, split, data_dir=data_dir)
    images = loaded.images if side is None else pooled(loaded.images, side)
    counts = np.rint(images * np.float32(_PIXELS[name].full)).astype(np.uint8)
    return Batch(jnp.asarray(counts), jnp.asarray(loaded.labels))


def pooled(images: Float[np.ndarray, "N H W C"], side: int) -> Float[np.ndarray, "N side side C"]:
    """Images of `side` pixels along both axes, each the mean of a square.

    Raises:
      ValueError: `side` does not divide the images.
    """
    count, height, width, channels = images.shape
    if side < 1 or height % side or width % side:
        raise ValueError(f"side={side}, expected a divisor of the images' {height} x {width} pixels")
    return images.reshape(count, side, height // side, side, width // side, channels).mean((2, 4))


def sample_batch(key: PRNGKeyArray, data: Batch, batch_size: int) -> Batch:
    """Rows drawn independently, so that one may come twice."""
    rows = jax.random.randint(key, (batch_size,), 0, len(data.labels))
    return Batch(data.inputs[rows], data.labels[rows])


# -- text --------------------------------------------------------------------------------------------------------------

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""The characters by their tokens: the line feed, then what ASCII can print."""

_TEXT_LENGTH = 1_500_000
# Single files with much text, in this order in all of Python 3.11 to 3.13.
# fmt: off
_MODULES = (
    "_pydecimal", "argparse", "ast", "bdb", "calendar", "configparser", "csv", "dataclasses", "difflib", "dis",
    "doctest", "enum", "fractions", "ftplib", "functools", "gettext", "gzip", "heapq", "imaplib", "inspect",
    "ipaddress", "locale", "mailbox", "optparse", "os", "pdb", "pickle", "pickletools", "platform", "plistlib",
    "pprint", "pstats", "pydoc", "random", "selectors", "shutil", "smtplib", "socket", "ssl", "statistics",
    "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback", "turtle",
    "typing", "uuid", "warnings",
)
# fmt: on


def standard_library_text() -> str:
    """1.5 million of `CHARACTERS` from modules of the standard library, one file after the other.

    Raises:
      FileNotFoundError: the library is here without its sources.
    """
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    wanted = set(CHARACTERS)
    text = "".join((folder / f"{module}.py").read_text("utf-8") for module in _MODULES)
    return "".join(character for character in text if character in wanted)[:_TEXT_LENGTH]


def text_data(text: str) -> TaskData:
    """Windows of `CONTEXT` characters, labelled with the characters that follow; the last tenth of a text is for tests.

    Args:
      text: of `CHARACTERS` only.
    """
    codes = np.frombuffer(text.encode("ascii"), np.uint8)
    tokens = np.where(codes == ord("\n"), 0, codes - 31).astype(np.uint8)
    end = round(0.9 * len(tokens))
    return TaskData(_windows(tokens[:end]), _windows(tokens[end:]))


def _windows(tokens: UInt8[np.ndarray, " N"]) -> Batch:
    count = (len(tokens) - 1) // CONTEXT
    inputs, labels = (tokens[first : first + count * CONTEXT].reshape(count, CONTEXT) for first in (0, 1))
    return Batch(jnp.asarray(inputs), jnp.asarray(labels.astype(np.int32)))


# -- tasks -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """A network and the data that it is trained on: static and hashable, without the data itself.

    Attributes:
      name: see `find_task`.
      data: name of the data set, for `load_task_data`.
      network: maps normalized images or tokens to logits.
      batch_size: for training.
    """

    name: str
    data: str
    network: Network
    batch_size: int = 128

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters: plain dicts of float32 arrays."""
        return self.network.init(key)

    def apply(self, params: Params, inputs: Shaped[Array, "B ..."]) -> Float[Array, "B ... classes"]:
        """Logits of inputs as they are in a `Batch`."""
        return self.network.apply(params, self.normalized(inputs))

    def normalized(self, inputs: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
        """What the network reads: float32 images of about unit variance, or the tokens themselves."""
        if self.data == _TEXT:
            return inputs
        pixels = _PIXELS[self.data.partition("-")[0]]
        mean, deviation = (jnp.asarray(x, jnp.float32) for x in (pixels.mean, pixels.deviation))
        return (inputs.astype(jnp.float32) / pixels.full - mean) / deviation

    def loss(self, params: Params, batch: Batch) -> Float[Array, ""]:
        """The mean cross entropy, in nats. That of a ConvNet has no forward-mode derivative, see `mean_over_chunks`."""
        return self._mean(_cross_entropy, params, batch)

    def accuracy(self, params: Params, batch: Batch) -> Float[Array, ""]:
        """The share of right answers."""
        return self._mean(_share_right, params, batch)

    def _mean(self, measure: _Measure, params: Params, batch: Batch) -> Float[Array, ""]:
        def of_logits(params: Params, batch: Batch) -> Float[Array, ""]:
            return measure(self.apply(params, batch.inputs), batch.labels)

        if isinstance(self.network, ConvNet):
            return mean_over_chunks(of_logits, _CHUNK, params, batch)
        return of_logits(params, batch)

    def spec(self) -> NeuralGraphSpec:
        """Of the parameters."""
        return _spec(self.network)


_Measure: TypeAlias = Callable[[Float[Array, "*B classes"], Int[Array, "*B"]], Float[Array, ""]]

# Images whose patches fit about into the second-level cache of a core.
_CHUNK = 8


def _cross_entropy(logits: Float[Array, "*B classes"], labels: Int[Array, "*B"]) -> Float[Array, ""]:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1).mean()


def _share_right(logits: Float[Array, "*B classes"], labels: Int[Array, "*B"]) -> Float[Array, ""]:
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32).mean()


@functools.cache
def _spec(network: Network) -> NeuralGraphSpec:
    return network.spec()


_SHORT = {"mnist": "mnist", "fashion": "fashion_mnist", "cifar": "cifar10", "digits": "digits"}
_CLASSES = 10


def find_task(name: str) -> Task:
    """The task of a name.

    Names are `<data>-cnn-<widths>` and `<data>-mlp-<widths>-<activation>`, with data of `mnist`, `fashion`, `cifar` and
    `digits`, and widths of the hidden layers: `fashion-cnn-16-32-32`, `digits-mlp-32-32-tanh`. A number behind the data
    makes images smaller: `fashion7-mlp-32-relu` reads 7 x 7 pixels. `stdlib-transformer` is the one over characters.

    Raises:
      ValueError: a name that is not made this way, or with an unknown activation.
    """
    if name == "stdlib-transformer":
        return Task(name, _TEXT, Transformer(len(CHARACTERS), CONTEXT, width=64, heads=4, layers=2), batch_size=32)
    match = re.fullmatch(rf"({'|'.join(_SHORT)})([1-9]\d*)?-(?:cnn((?:-[1-9]\d*)+)|mlp((?:-[1-9]\d*)+)-([a-z]+))", name)
    if match is None:
        raise ValueError(
            f"unknown task {name!r}; expected a name like fashion-cnn-16-32-32, digits-mlp-32-32-tanh, or "
            f"stdlib-transformer, with data of {', '.join(_SHORT)}"
        )
    short, side, cnn, mlp, activation = match.groups()
    height, width, channels = IMAGE_SETS[_SHORT[short]].image_shape
    data = _SHORT[short]
    if side:
        data, height, width = f"{data}-{side}", int(side), int(side)
    hidden = tuple(int(n) for n in (cnn or mlp)[1:].split("-"))
    if cnn:
        return Task(name, data, ConvNet((channels, *hidden), _CLASSES))
    return Task(name, data, MLP((height * width * channels, *hidden, _CLASSES), activation))


def _sweeps(data: str, width: int) -> list[str]:
    """Names of convnets of all widths, and of those with one to five convolutions at one width."""
    widths = [(w // 2, w, w) for w in (8, 16, 32, 64, 128)]
    depths = [(width // 2, *(width,) * more) for more in range(5)]
    return [f"{data}-cnn-{'-'.join(map(str, channels))}" for channels in (*widths, *depths)]


_MLPS = [
    "digits-mlp-32-relu",
    "digits-mlp-32-32-tanh",
    "digits-mlp-64-32-gelu",
    "digits-mlp-32-32-32-silu",
    "mnist-mlp-32-relu",
    "mnist-mlp-64-64-silu",
    "fashion-mlp-32-32-tanh",
    "fashion-mlp-128-relu",
]

TASKS: dict[str, Task] = {
    name: find_task(name)
    for name in ("stdlib-transformer", *_MLPS, *_sweeps("fashion", width=32), *_sweeps("cifar", width=64))
}
"""The tasks of the paper (`fashion-cnn-16-32-32`, `cifar-cnn-32-64-64`) and others by name. `find_task` makes more."""


# -- random reparametrizations -----------------------------------------------------------------------------------------


def draw_scales(key: PRNGKeyArray, params: PyTree, spread: float) -> PyTree:
    """One positive number for each tensor, log-uniform in `[1/spread, spread]`.

    An optimizer that sees `q = unscale(scales, p)` and the loss of `rescale(scales, q)` meets the same task with
    gradients and parameters of other sizes (Metz et al. 2022, arXiv 2211.09760).
    """
    leaves, treedef = jax.tree.flatten(params)
    exponents = jax.random.uniform(key, (len(leaves),), minval=-1.0, maxval=1.0)
    return jax.tree.unflatten(treedef, list(jnp.exp(math.log(spread) * exponents)))


def rescale(scales: PyTree, scaled: PyTree) -> PyTree:
    """`p = s q`, tensor by tensor: the parameters that the network is run with."""
    return jax.tree.map(jnp.multiply, scales, scaled)


def unscale(scales: PyTree, params: PyTree) -> PyTree:
    """`q = p / s`, the inverse of `rescale`: the parameters that the optimizer sees."""
    return jax.tree.map(lambda scale, leaf: leaf / scale, scales, params)
