"""A trained model as one safetensors file: its arrays, its configuration and a format version."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from ngjax.files import write_atomically
from ngjax.nn.encoder import EncoderConfig, WeightStatistics
from ngjax.nn.gnn import NGGNN
from ngjax.nn.readout import GraphReadout, ParamsReadout, WeightSpaceModel
from ngjax.nn.transformer import NGT

_FORMAT = "ngjax.model"
_VERSION = 1
_CLASSES = {
    cls.__name__: cls
    for cls in (NGGNN, NGT, GraphReadout, ParamsReadout, WeightSpaceModel, EncoderConfig, WeightStatistics)
}


class LoadedModel(NamedTuple):
    """What `load_model` returns: `model.apply(variables, graph, ...)`, and the text stored beside it."""

    model: nn.Module
    variables: dict[str, Any]
    metadata: dict[str, str]


def save_model(
    path: str | os.PathLike[str],
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a model of this library and its variables; a file of that name is replaced at once or not at all.

    Args:
      path: of the file.
      model: an `NGGNN`, `NGT`, `GraphReadout`, `ParamsReadout` or `WeightSpaceModel`.
      variables: what `model.init` returned, trained.
      metadata: any text to keep with it (data, command, seed, date).

    Raises:
      ValueError: a variable that is not finite, named by its path.
      TypeError: a module that is not of this library.
      OSError: the folder cannot be written to.
    """
    path = pathlib.Path(path)
    arrays = {name: np.asarray(value) for name, value in traverse_util.flatten_dict(dict(variables), sep="/").items()}
    for name, array in arrays.items():
        if not np.all(np.isfinite(array.astype(np.float32))):
            raise ValueError(f"variable {name} has values that are not finite; {path} was not written")
    header = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "config": json.dumps(_to_json(model)),
        "metadata": json.dumps(dict(metadata or {})),
    }
    content = safetensors.numpy.save(arrays, metadata=header)
    with write_atomically(path) as unfinished:
        unfinished.write_bytes(content)


def load_model(path: str | os.PathLike[str]) -> LoadedModel:
    """Reads what `save_model` wrote.

    Raises:
      ValueError: not such a file, cut short, or of a version this library does not know.
      FileNotFoundError: there is no such file.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a model file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ValueError(f"{path} is not a model of this library: it has no format {_FORMAT!r}")
            if header.get("version") != str(_VERSION):
                raise ValueError(
                    f"{path} has format version {header.get('version')}; this library reads version {_VERSION}"
                )
            arrays = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118, not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    model = _from_json(json.loads(header["config"]), path)
    variables = traverse_util.unflatten_dict(arrays, sep="/")
    return LoadedModel(model, variables, json.loads(header["metadata"]))


def _to_json(value: Any) -> Any:
    name = type(value).__name__
    if isinstance(value, WeightStatistics):
        return {"class": name} | {k: _to_json(v) for k, v in value._asdict().items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        if _CLASSES.get(name) is not type(value):
            raise TypeError(f"expected a module of this library ({', '.join(_CLASSES)}), received {name}")
        return {"class": name} | {k: _to_json(v) for k, v in fields.items() if k not in ("parent", "name")}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return [_to_json(item) for item in value]
    return {"dtype": jnp.dtype(value).name}


def _from_json(value: Any, path: pathlib.Path) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item, path) for item in value)
    if not isinstance(value, dict):
        return value
    if "dtype" in value and "class" not in value:
        try:
            return jnp.dtype(value["dtype"]).type
        except TypeError:
            raise ValueError(f"{path} names a dtype {value['dtype']!r} that does not exist") from None
    fields = {k: _from_json(v, path) for k, v in value.items() if k != "class"}
    if value.get("class") not in _CLASSES:
        raise ValueError(f"{path} holds a module of class {value.get('class')!r}, which this library does not have")
    try:
        return _CLASSES[value["class"]](**fields)
    except TypeError as error:
        raise ValueError(f"{path}: the configuration of {value['class']} does not fit this library: {error}") from None
