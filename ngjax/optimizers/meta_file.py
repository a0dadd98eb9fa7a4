"""Meta-parameters as one safetensors file: arrays, and how they came about."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from ngjax.files import write_atomically

_FORMAT = "ngjax.meta_params"
_VERSION = "1"


class MetaFile(NamedTuple):
    """What a file holds.

    Attributes:
      theta: meta-parameters, for `ng_learned_opt`, as NumPy arrays.
      metadata: what was stored beside them: rule, form of the step, settings and so on.
    """

    theta: dict[str, Any]
    metadata: dict[str, Any]


def save_meta_params(path: str | os.PathLike[str], theta: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes meta-parameters; a file of that name is replaced at once or not at all.

    Args:
      path: of the file.
      theta: nested dictionaries of arrays, finite.
      metadata: what JSON can hold.

    Raises:
      ValueError: an array that is not finite, named by its path.
      OSError: the folder cannot be written to.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(dict(theta), sep="/").items()}
    for name, array in arrays.items():
        if not np.all(np.isfinite(array)):
            raise ValueError(f"meta-parameter {name} has values that are not finite; {path} was not written")
    header = {"format": _FORMAT, "version": _VERSION, "metadata": json.dumps(dict(metadata))}
    content = safetensors.numpy.save(arrays, metadata=header)
    with write_atomically(path) as unfinished:
        unfinished.write_bytes(content)


def load_meta_params(path: str | os.PathLike[str]) -> MetaFile:
    """Reads what `save_meta_params` wrote.

    Raises:
      ValueError: not such a file, cut short, or of a version this library does not know.
      FileNotFoundError: there is no such file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
                raise ValueError(
                    f"{path} has format {header.get('format')!r}, version {header.get('version')}; expected "
                    f"{_FORMAT!r}, version {_VERSION}"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return MetaFile(traverse_util.unflatten_dict(arrays, sep="/"), json.loads(header["metadata"]))


def check_made_for(file: MetaFile, rule: Any, step: str, where: str) -> None:
    """Raises where a file says that its meta-parameters are of another rule or step: shapes may agree all the same.

    Args:
      file: what was read.
      rule: a name; of a rule that has none only the step is checked.
      step: form of the step.
      where: the file was given, for the message.
    """
    for name, expected in (("rule", rule), ("step", step)):
        found = file.metadata.get(name, expected)
        if isinstance(expected, str) and found != expected:
            raise ValueError(
                f"{where}: expected meta-parameters of {name}={expected!r}, the file has those of {found!r}"
            )
