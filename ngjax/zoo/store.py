"""Model zoos on disk: thousands of networks with labels, memory-mapped, readable in part by many processes.

A zoo is a folder with an index and shards:

* `index.json`: a format version, metadata, the specs of all architectures, the label columns, and which shards there
  are, with their sizes, hashes and where their networks come from.
* `shard-00000.safetensors`, `shard-00001.safetensors`, ...: stacked networks of one architecture each, as tensors
  `params/<path>` `[rows, ...]` and `labels/<name>` `[rows]`.

Networks are numbered in the order they were appended, and nothing that is in a zoo ever changes. An append writes one
shard and then the index that mentions it, each under a temporary name first; a process killed at any moment leaves the
zoo as it was before the append or as it is after it.
"""

from __future__ import annotations

import bisect
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import pathlib
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import safetensors.numpy
from jaxtyping import Int, Shaped, UInt8
from numpy.lib.stride_tricks import as_strided

from ngjax.files import UNFINISHED, map_files, write_atomically
from ngjax.spec import NeuralGraphSpec, format_path

_FORMAT = "ngjax.zoo"
_VERSION = 1
_INDEX = "index.json"
_LOCK = ".lock"

# Names of dtypes in the headers of safetensors files.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


class Entry(NamedTuple):
    """One network of a zoo.

    Attributes:
      params: its parameters. The arrays look into the file: not writable, and read from disk when they are used.
      spec: its architecture.
      labels: what is known about it; of a label with categories the name.
    """

    params: Any
    spec: NeuralGraphSpec
    labels: dict[str, Any]


class _Column(NamedTuple):
    """A tensor of a shard: the shape and dtype of one row."""

    shape: tuple[int, ...]
    dtype: str


class _ShardInfo(NamedTuple):
    """What the index says about a shard. `spec` and `provenance` are numbers of lists in the index."""

    rows: int
    spec: int
    bytes: int
    sha256: str
    provenance: int


class _Index(NamedTuple):
    """The content of `index.json`."""

    metadata: dict[str, Any]
    categories: dict[str, tuple[str, ...]]
    labels: dict[str, str]  # dtypes; known when there is a shard
    specs: tuple[NeuralGraphSpec, ...]
    provenance: tuple[dict[str, Any], ...]
    shards: tuple[_ShardInfo, ...]


class _Layout(NamedTuple):
    """How the leaves of an architecture lie in a shard, and how they become a pytree.

    Attributes:
      columns: of the tensors, by name, in the order of the spec's parameters.
      treedef: of dicts, lists and tuples.
      order: number of the spec's parameter for each leaf of the pytree.
    """

    columns: dict[str, _Column]
    treedef: jax.tree_util.PyTreeDef
    order: tuple[int, ...]

    def tree(self, leaves: Sequence[Any]) -> Any:
        return self.treedef.unflatten([leaves[i] for i in self.order])


class _Shard(NamedTuple):
    """A shard in memory: arrays that look into its file. `leaves` are in the order of the spec's parameters.

    Attributes:
      leaves: `[rows, ...]`.
      labels: `[rows]`, by name.
      starts: where each leaf begins among all shards of the zoo, counted in numbers of its dtype.
    """

    leaves: list[np.ndarray]
    labels: dict[str, np.ndarray]
    starts: list[int]


def open(path: str | os.PathLike[str]) -> Zoo:
    """The zoo in a folder, as it is now; networks appended later are not seen.

    Reads the index and the headers of the shards; parameters are read from disk when they are used.

    Args:
      path: the folder that `ZooWriter` made.

    Raises:
      FileNotFoundError: there is no zoo in the folder, or a shard is missing.
      ValueError: an index that is broken, of another version, or does not fit the shards.
    """
    folder = pathlib.Path(path).absolute()
    return Zoo(folder, _read_index(folder))


class Zoo:
    """Networks with their specs and labels; what `ngjax.zoo.open` returns.

    `zoo[i]` is one network, `len(zoo)` how many there are, and a loop goes through all of them. It may be pickled and
    handed to other processes, which see the same networks.

    Attributes:
      path: of the folder.
      specs: the architectures.
      metadata: what the zoo was created with.
      categories: the names that the codes of a label stand for, by label.
      provenance: where the networks come from, one entry per writer that appended some.
    """

    def __init__(self, path: pathlib.Path, index: _Index) -> None:
        self.path = path
        self.specs = index.specs
        self.metadata = index.metadata
        self.categories = index.categories
        self.provenance = index.provenance
        self._index = index
        self._layouts = [_layout(spec, f"{path / _INDEX}, spec {i}") for i, spec in enumerate(index.specs)]
        paths = [path / _shard_name(number) for number in range(len(index.shards))]
        try:
            self._bytes, self._places = map_files(paths)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "a shard that the index names is missing", error.filename) from None
        self._shards = [
            _find_shard(path, self._bytes, place, info, self._layouts[info.spec], index.labels)
            for path, place, info in zip(paths, self._places, index.shards, strict=True)
        ]
        rows = list(itertools.accumulate((info.rows for info in index.shards), initial=0))
        self._first_rows, self._len = rows[:-1], rows[-1]  # a list: bisecting an array is ten times as slow
        self._known_windows: dict[tuple[str, int], np.ndarray] = {}
        self._shard_specs = np.array([info.spec for info in index.shards], np.int32)
        most_leaves = max((len(shard.starts) for shard in self._shards), default=0)
        self._leaf_starts = np.zeros((len(self._shards), most_leaves), np.int64)
        for number, shard in enumerate(self._shards):
            self._leaf_starts[number, : len(shard.starts)] = shard.starts

    def __reduce__(self) -> tuple[Any, ...]:
        return Zoo, (self.path, self._index)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: Any) -> Entry:
        """Network number `index`, counted from the end where it is negative.

        Raises:
          IndexError: there is no such network.
          TypeError: not an integer.
        """
        try:
            row = operator.index(index)
        except TypeError:
            raise TypeError(
                f"expected the number of one network, received {index!r}; zoo.read(rows) reads many at once"
            ) from None
        if not -self._len <= row < self._len:
            raise IndexError(f"network {row} of a zoo of {self._len} networks: {self.path}")
        row %= self._len
        number = bisect.bisect_right(self._first_rows, row) - 1
        row -= self._first_rows[number]
        shard, spec = self._shards[number], self._index.shards[number].spec
        labels = {name: column[row] for name, column in shard.labels.items()}
        for name, names in self.categories.items():
            labels[name] = names[labels[name]]
        return Entry(self._layouts[spec].tree([leaf[row, ...] for leaf in shard.leaves]), self.specs[spec], labels)

    def __iter__(self) -> Iterator[Entry]:
        return (self[i] for i in range(self._len))

    @functools.cached_property
    def spec_ids(self) -> Int[np.ndarray, " N"]:
        """For each network the number of its architecture in `specs`."""
        return np.repeat(self._shard_specs, [info.rows for info in self._index.shards])

    @functools.cached_property
    def labels(self) -> dict[str, np.ndarray]:
        """Label columns, `[N]` each, not writable; those in `categories` hold codes. Empty as long as the zoo is."""
        columns = {}
        for name in self._index.labels:
            columns[name] = np.concatenate([shard.labels[name] for shard in self._shards])
            columns[name].flags.writeable = False
        return columns

    def rows(self, **labels: Any) -> Int[np.ndarray, " rows"]:
        """Numbers of the networks whose labels have all of the given values: `zoo.rows(split="train", label=3)`.

        Args:
          **labels: a value for each label; for one with categories the name or the code.

        Raises:
          ValueError: a label or a category that the zoo does not have.
        """
        chosen = np.ones(len(self), bool)
        for name, value in labels.items():
            if name not in self._index.labels:
                raise ValueError(f"{self.path} has no label {name!r}; it has {_listed(self._index.labels)}")
            names = self.categories.get(name, ())
            if isinstance(value, str):
                if value not in names:
                    has = f"it is one of {_listed(names)}" if names else f"it is {self._index.labels[name]}"
                    raise ValueError(f"label {name!r} of {self.path} is never {value!r}; {has}")
                value = names.index(value)
            if np.ndim(value):
                raise ValueError(f"label {name!r}: expected one value, received {value!r}")
            chosen &= self.labels[name] == value
        return np.flatnonzero(chosen)

    def read(self, rows: Any) -> Any:
        """Parameters of many networks of one architecture, as a pytree of new arrays `[len(rows), ...]`.

        Args:
          rows: numbers of networks in any order, also repeatedly; or a mask of all networks.

        Raises:
          IndexError: there is no such network.
          TypeError: no integers.
          ValueError: networks of several architectures, or no rows where there are several.
        """
        numbers = self._numbers(rows)
        first_rows = np.array(self._first_rows, np.int64)
        shards = first_rows.searchsorted(numbers, side="right") - 1
        layout = self._layouts[self._one_spec(shards)]
        places = numbers - first_rows[shards]
        starts = self._leaf_starts[shards].T
        leaves = []
        for column, start in zip(layout.columns.values(), starts, strict=False):
            size = math.prod(column.shape)
            leaves.append(self._windows(column.dtype, size)[start + places * size].reshape(len(numbers), *column.shape))
        return layout.tree(leaves)

    def _windows(self, dtype: str, size: int) -> Shaped[np.ndarray, "starts size"]:
        """Every sequence of `size` numbers in the shards, overlapping, by where it starts: one gather reaches all.

        To be indexed by rows only: that looks at no more than it returns, while `np.take` makes a copy of it all.
        """
        if (dtype, size) not in self._known_windows:
            numbers = self._bytes.view(dtype)
            self._known_windows[dtype, size] = as_strided(
                numbers, (len(numbers) - size + 1, size), 2 * numbers.strides, writeable=False
            )
        return self._known_windows[dtype, size]

    def _numbers(self, rows: Any) -> Int[np.ndarray, " rows"]:
        numbers = np.asarray(rows)
        if numbers.dtype == bool:
            if numbers.shape != (len(self),):
                raise IndexError(f"rows: a mask has to be of shape ({len(self)},), received {numbers.shape}")
            return np.flatnonzero(numbers)
        if numbers.size == 0:
            return np.zeros(0, np.int64)
        if not np.issubdtype(numbers.dtype, np.integer) or numbers.ndim != 1:
            raise TypeError(f"rows: expected integers [rows], received {numbers.dtype}{list(numbers.shape)}")
        outside = (numbers < -len(self)) | (numbers >= len(self))
        if outside.any():
            raise IndexError(f"network {numbers[outside][0]} of a zoo of {len(self)} networks: {self.path}")
        numbers = numbers.astype(np.int64)
        return np.where(numbers < 0, numbers + len(self), numbers)

    def _one_spec(self, shards: Int[np.ndarray, " rows"]) -> int:
        """The architecture of these shards; of all shards, where there are none."""
        specs = self._shard_specs[shards] if len(shards) else self._shard_specs
        if not len(specs) or (specs != specs[0]).any():
            received = f"rows of architectures {_listed(np.unique(specs).tolist())}" if len(shards) else "no rows"
            raise ValueError(
                f"rows: expected networks of one of the {len(self.specs)} architectures, received {received}; "
                "zoo.spec_ids tells them apart"
            )
        return int(specs[0])

    def verify(self) -> None:
        """Reads everything: each shard must be what was written, and every number finite.

        Raises:
          ValueError: names the shard, and the network where it is one.
        """
        for number, info in enumerate(self._index.shards):
            path, shard = self.path / _shard_name(number), self._shards[number]
            received = hashlib.sha256(self._bytes[self._places[number]].data).hexdigest()
            if received != info.sha256:
                raise ValueError(
                    f"{path} is not the file that was written: expected SHA-256 {info.sha256}, found {received}"
                )
            spec, first = self.specs[info.spec], self._first_rows[number]
            _check_values(spec, shard.leaves, shard.labels, self.categories, str(path), first)

    def __repr__(self) -> str:
        size = sum(info.bytes for info in self._index.shards)
        counts = np.bincount(self.spec_ids, minlength=len(self.specs))
        kinds = [f"{count:,} x {_sizes(spec)}" for spec, count in zip(self.specs, counts, strict=True)]
        labels = [
            f"{name} ({', '.join(self.categories[name])})" if name in self.categories else name
            for name in self._index.labels
        ]
        return (
            f"Zoo({str(self.path)!r}): {len(self):,} networks ({_listed(kinds)}), labels {_listed(labels)}, "
            f"{size / 1e6:,.1f} MB"
        )


class ZooWriter:
    """Creates a zoo, or appends to one; to be used in a `with` block, which holds a lock on the folder.

    >>> import tempfile
    >>> import numpy as np
    >>> import ngjax.zoo
    >>> spec = ngjax.mlp_spec((2, 3, 1), activation="siren")
    >>> params = {
    ...     "layer_0": {"kernel": np.ones((5, 2, 3), np.float32), "bias": np.ones((5, 3), np.float32)},
    ...     "layer_1": {"kernel": np.ones((5, 3, 1), np.float32), "bias": np.ones((5, 1), np.float32)},
    ... }
    >>> folder = tempfile.TemporaryDirectory()
    >>> with ngjax.zoo.ZooWriter(folder.name, categories={"split": ("train", "test")}) as writer:
    ...     writer.append(spec, params, {"digit": np.arange(5), "split": np.array([0, 0, 0, 1, 1])})
    >>> zoo = ngjax.zoo.open(folder.name)
    >>> zoo[-1].labels["split"], zoo.rows(split="train")
    ('test', array([0, 1, 2]))
    >>> zoo.read([4, 1])["layer_0"]["kernel"].shape
    (2, 2, 3)
    >>> folder.cleanup()

    Args:
      path: the folder, made if missing. Files of others in it are left alone.
      metadata: about the zoo as a whole, anything that JSON can say. An existing zoo has to have the same; `None` takes
        what it has.
      categories: for labels that are codes, the names they stand for; likewise.
      provenance: where the networks come from that this writer appends, anything that JSON can say.

    Raises:
      BlockingIOError: (on entering) another process is writing to this zoo; the message says which.
      OSError: (on entering) the folder cannot be written to.
      ValueError: (on entering) the zoo is broken or has other metadata or categories.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, Any] | None = None,
        categories: Mapping[str, Sequence[str]] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = pathlib.Path(path).absolute()
        self._metadata = None if metadata is None else _json_object(metadata, "metadata")
        self._categories = None if categories is None else _checked_categories(categories, "categories")
        self._provenance = _json_object(provenance or {}, "provenance")
        self._lock: IO[str] | None = None
        self._index = _Index({}, {}, {}, (), (), ())

    def __enter__(self) -> ZooWriter:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _acquire(self.path)
        try:
            self._prepare()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            # Before it is closed: children of this process may have the same file open.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
            self._lock = None

    def _prepare(self) -> None:
        for name in (_INDEX, "shard-*.safetensors"):
            for left in self.path.glob(f"{UNFINISHED}*-{name}"):
                left.unlink()
        if (self.path / _INDEX).exists():
            self._index = _read_index(self.path)
            Zoo(self.path, self._index)  # nothing is appended to what cannot be read
            for what, given, found in (
                ("metadata", self._metadata, self._index.metadata),
                ("categories", self._categories, self._index.categories),
            ):
                if given is not None and given != found:
                    raise ValueError(f"{self.path} holds a zoo with other {what}: {_difference(found, given)}")
            return
        if any(self.path.glob("shard-*.safetensors")):
            raise ValueError(f"{self.path} holds shards of a zoo without its index ({_INDEX}), which would be replaced")
        self._index = self._index._replace(metadata=self._metadata or {}, categories=self._categories or {})
        _write_index(self.path, self._index)

    def __len__(self) -> int:
        """Networks in the zoo, those of earlier writers included."""
        return sum(info.rows for info in self._index.shards)

    def append(self, spec: NeuralGraphSpec, params: Any, labels: Mapping[str, npt.ArrayLike]) -> None:
        """Adds networks of one architecture as one shard. When this returns, they are on disk; if it raises, none is.

        Args:
          spec: the architecture. Its pytree has to consist of dicts, lists and tuples.
          params: leaves `[rows, ...]` with shapes and dtypes of the spec; NumPy or JAX arrays.
          labels: columns `[rows]`, the same ones with the same dtypes in every append; labels with categories hold
            codes.

        Raises:
          OSError: the disk is full or failed.
          ValueError: parameters or labels that do not fit the spec, one another or the zoo, or are not finite.
        """
        if self._lock is None:
            raise ValueError("append works inside the writer's with block only")
        before = self._index
        # As it will be read back: its pytree is rebuilt from the paths, whatever it was made of.
        stored = {spec: spec for spec in before.specs}.get(spec) or NeuralGraphSpec.from_json(spec.to_json())
        layout = _layout(stored, "append")
        leaves = [np.asarray(leaf) for leaf in spec.flatten(params)]
        columns = {name: np.asarray(column) for name, column in labels.items()}
        rows = _check_rows(layout, leaves, columns)
        _check_labels(before, columns, len(self), self.path)
        _check_values(spec, leaves, columns, before.categories, "append", 0)

        tensors = dict(zip(layout.columns, leaves, strict=True))
        tensors |= {_label_name(name): column for name, column in columns.items()}
        content = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in tensors.items()})
        specs = before.specs if stored in before.specs else (*before.specs, stored)
        known = self._provenance in before.provenance
        provenance = before.provenance if known else (*before.provenance, self._provenance)
        info = _ShardInfo(
            rows=rows,
            spec=specs.index(stored),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            provenance=provenance.index(self._provenance),
        )
        after = before._replace(
            labels=before.labels or {name: str(column.dtype) for name, column in columns.items()},
            specs=specs,
            provenance=provenance,
            shards=(*before.shards, info),
        )
        shard_path = self.path / _shard_name(len(before.shards))
        try:
            with write_atomically(shard_path) as unfinished:
                unfinished.write_bytes(content)
            _write_index(self.path, after)
        except BaseException:
            # Interrupted at the very end, the new index may be there already.
            self._index = _read_index(self.path)
            if len(self._index.shards) == len(before.shards):
                shard_path.unlink(missing_ok=True)
            raise
        self._index = after


# -- checks of what is appended ---------------------------------------------------------------------------------------


def _layout(spec: NeuralGraphSpec, where: str) -> _Layout:
    columns: dict[str, _Column] = {}
    for param in spec.params:
        path = format_path(param.path)
        if param.dtype not in _DTYPES.values():
            raise ValueError(f"{where}: a zoo cannot store parameter {path} of dtype {param.dtype}")
        if _param_name(path) in columns:
            raise ValueError(f"{where}: two parameters have the path {path}")
        columns[_param_name(path)] = _Column(param.shape, param.dtype)
    try:
        tree = spec.unflatten(range(len(spec.params)))
    except ValueError as error:
        raise ValueError(f"{where}: a zoo stores pytrees of dicts, lists and tuples: {error}") from None
    order, treedef = jax.tree.flatten(tree)
    return _Layout(columns, treedef, tuple(order))


def _check_rows(layout: _Layout, leaves: Sequence[np.ndarray], labels: Mapping[str, np.ndarray]) -> int:
    """The number of rows that all arrays have."""
    rows = len(leaves[0]) if leaves[0].ndim else 0
    for (name, column), leaf in zip(layout.columns.items(), leaves, strict=True):
        expected = (rows, *column.shape)
        if leaf.shape != expected or leaf.dtype != column.dtype:
            raise ValueError(
                f"{name}: expected {column.dtype}{list(expected)}, a network per row, "
                f"received {leaf.dtype}{list(leaf.shape)}"
            )
    for name, array in labels.items():
        if array.shape != (rows,):
            raise ValueError(f"label {name!r}: expected [{rows}], a value per network, received {list(array.shape)}")
    if rows == 0:
        raise ValueError("expected at least one network, received none")
    return rows


def _check_labels(index: _Index, labels: Mapping[str, np.ndarray], networks: int, path: pathlib.Path) -> None:
    """That the columns are those of the zoo, or may become them."""
    received = {name: str(column.dtype) for name, column in labels.items()}
    for name, dtype in received.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"label {name!r}: expected a name")
        if dtype not in _DTYPES.values():
            raise ValueError(f"label {name!r}: a zoo cannot store {dtype}; texts are codes of categories")
    if networks and received != index.labels:
        raise ValueError(
            f"{path} holds a zoo with other labels than were received: {_difference(index.labels, received)}"
        )
    for name in index.categories:
        if not np.issubdtype(np.dtype(received.get(name, "O")), np.integer):
            raise ValueError(
                f"label {name!r} has categories: expected integer codes, received {received.get(name, 'no such label')}"
            )


def _check_values(
    spec: NeuralGraphSpec,
    leaves: Sequence[np.ndarray],
    labels: Mapping[str, np.ndarray],
    categories: Mapping[str, Sequence[str]],
    where: str,
    first: int,
) -> None:
    """That numbers are finite and codes have a name. Rows are counted from `first`."""

    def check(name: str, good: np.ndarray, wrong: str) -> None:
        if not good.all():
            row = int(np.argwhere(~good)[0, 0])
            raise ValueError(f"{where}: network {first + row}: {name} {wrong}")

    named = {format_path(param.path): leaf for param, leaf in zip(spec.params, leaves, strict=True)}
    for name, array in (named | {f"label {name!r}": column for name, column in labels.items()}).items():
        if jnp.issubdtype(array.dtype, jnp.floating):
            check(name, np.isfinite(array), "has values that are not finite")
    for name, names in categories.items():
        codes = labels[name]
        check(f"label {name!r}", (codes >= 0) & (codes < len(names)), f"is no code of {_listed(names)}")


def _json_object(value: Any, what: str) -> dict[str, Any]:
    """As it will be read back."""
    try:
        result = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what}: expected what JSON can say: {error}") from None
    if not isinstance(result, dict):
        raise TypeError(f"{what}: expected a dictionary, received {type(value).__name__}")
    return result


def _checked_categories(categories: Mapping[str, Any], where: str) -> dict[str, tuple[str, ...]]:
    for label, names in categories.items():
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{where}: {label!r}: expected a list of names, received {names!r}")
        if len(set(names)) != len(names):
            raise ValueError(f"{where}: {label!r}: a name is there twice in {names!r}")
    return {label: tuple(names) for label, names in categories.items()}


def _difference(found: Any, given: Any, where: str = "") -> str:
    """What is different between two JSON values, in words."""
    if not (isinstance(found, dict) and isinstance(given, dict)):
        return f"{where}: {_short(found)} in the zoo, received {_short(given)}"
    parts = []
    for key in [*found, *(key for key in given if key not in found)]:
        inner = f"{where}.{key}" if where else str(key)
        if key not in found:
            parts.append(f"{inner}: not in the zoo, received {_short(given[key])}")
        elif key not in given:
            parts.append(f"{inner}: {_short(found[key])} in the zoo, received none")
        elif found[key] != given[key]:
            parts.append(_difference(found[key], given[key], inner))
    return "; ".join(parts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _listed(values: Sequence[Any] | Mapping[str, Any], most: int = 8) -> str:
    texts = [str(value) for value in values]
    shown = ", ".join(texts[:most])
    return f"{shown}, ... ({len(texts)} in all)" if len(texts) > most else shown or "none"


def _sizes(spec: NeuralGraphSpec) -> str:
    """`2-32-32-1`; groups of neurons side by side do not show."""
    sizes = [str(group.size) for group in spec.node_groups]
    return "-".join(sizes if len(sizes) <= 8 else [*sizes[:4], "...", *sizes[-2:]])


# -- the index --------------------------------------------------------------------------------------------------------


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _param_name(path: str) -> str:
    return f"params/{path}"


def _label_name(name: str) -> str:
    return f"labels/{name}"


def _write_index(folder: pathlib.Path, index: _Index) -> None:
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "metadata": index.metadata,
        "categories": index.categories,
        "labels": index.labels,
        "provenance": index.provenance,
        "shards": [{"file": _shard_name(number)} | info._asdict() for number, info in enumerate(index.shards)],
        "specs": [json.loads(spec.to_json()) for spec in index.specs],
    }
    with write_atomically(folder / _INDEX) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_index(folder: pathlib.Path) -> _Index:
    path = folder / _INDEX
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(errno.ENOENT, "there is no zoo, which has an index", str(path)) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not the index of a zoo: {error}") from None
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not the index of a zoo: {error}") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not the index of a zoo: it has no format {_FORMAT!r}")
    if content.get("version") != _VERSION:
        raise ValueError(f"{path} has format version {content.get('version')!r}; this library reads version {_VERSION}")

    def get(item: Any, key: str, kind: type, where: str = "") -> Any:
        value = item.get(key) if isinstance(item, dict) else None
        # `True` is an int for Python; the smallest number that any field may have is 0.
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise ValueError(f"{path}: {where}{key!r}: expected {_KINDS[kind]}, received {_short(value)}")
        return value

    specs = []
    for number, item in enumerate(get(content, "specs", list)):
        try:
            specs.append(NeuralGraphSpec.from_json(json.dumps(item)))
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{path}: spec {number}: {error}") from None
    labels = get(content, "labels", dict)
    for name, dtype in labels.items():
        if dtype not in _DTYPES.values():
            raise ValueError(f"{path}: label {name!r}: unknown dtype {_short(dtype)}")
    categories = get(content, "categories", dict)
    for name in categories:
        get(categories, name, list, "'categories': ")
        if labels and not np.issubdtype(labels.get(name, "O"), np.integer):
            raise ValueError(f"{path}: 'categories': {name!r} is no label of integers")
    provenance = get(content, "provenance", list)
    if not all(isinstance(item, dict) for item in provenance):
        raise ValueError(f"{path}: 'provenance': expected objects, received {_short(provenance)}")
    shards = []
    for number, item in enumerate(get(content, "shards", list)):
        where = f"shard {number}: "
        if get(item, "file", str, where) != _shard_name(number):
            raise ValueError(f"{path}: {where}expected the file {_shard_name(number)}, received {item['file']!r}")
        info = _ShardInfo(**{key: get(item, key, kind, where) for key, kind in _SHARD_FIELDS.items()})
        if info.rows == 0 or info.spec >= len(specs) or info.provenance >= len(provenance):
            raise ValueError(
                f"{path}: {where}expected rows, one of {len(specs)} specs and one of {len(provenance)} provenance "
                f"entries, received {info.rows} rows, spec {info.spec}, provenance {info.provenance}"
            )
        shards.append(info)
    return _Index(
        metadata=get(content, "metadata", dict),
        categories=_checked_categories(categories, str(path)),
        labels=labels,
        specs=tuple(specs),
        provenance=tuple(provenance),
        shards=tuple(shards),
    )


_SHARD_FIELDS = {"rows": int, "spec": int, "bytes": int, "sha256": str, "provenance": int}
_KINDS = {int: "a whole number", str: "a text", list: "a list", dict: "an object"}


# -- shards -----------------------------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """A tensor of a shard. `start` is its first byte among those of all shards."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def array(self, content: UInt8[np.ndarray, " bytes"]) -> np.ndarray:
        size = math.prod(self.shape) * self.dtype.itemsize
        return content[self.start : self.start + size].view(self.dtype).reshape(self.shape)


def _find_shard(
    path: pathlib.Path,
    content: UInt8[np.ndarray, " bytes"],
    place: slice,
    info: _ShardInfo,
    layout: _Layout,
    labels: Mapping[str, str],
) -> _Shard:
    """The arrays of a shard, checked against the index; `content` holds all shards, and this one at `place`."""
    if place.stop - place.start != info.bytes:
        raise ValueError(
            f"{path} is not the file that was written: expected {info.bytes} bytes, found {place.stop - place.start}"
        )
    tensors = _read_header(content, place, path)
    columns = layout.columns | {_label_name(name): _Column((), dtype) for name, dtype in labels.items()}
    for name in [*columns, *(name for name in tensors if name not in columns)]:
        expected = _described(columns[name].dtype, (info.rows, *columns[name].shape)) if name in columns else "none"
        found = _described(str(tensors[name].dtype), tensors[name].shape) if name in tensors else "none"
        if expected != found:
            raise ValueError(f"{path} does not fit the index: {name}: expected {expected}, found {found}")
    leaves = [tensors[name] for name in layout.columns]
    return _Shard(
        leaves=[leaf.array(content) for leaf in leaves],
        labels={name: tensors[_label_name(name)].array(content) for name in labels},
        starts=[leaf.start // leaf.dtype.itemsize for leaf in leaves],
    )


def _described(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype}{list(shape)}"


def _read_header(content: UInt8[np.ndarray, " bytes"], place: slice, path: pathlib.Path) -> dict[str, _Tensor]:
    """The tensors that a safetensors file says it has, checked to be inside of it.

    The format: the length of the header in 8 bytes, the header as JSON, and the tensors one after the other.
    """
    length = int.from_bytes(content[place][:8].tobytes(), "little")
    first = place.start + 8 + length
    if first > place.stop:
        raise ValueError(f"{path} is not a whole safetensors file")
    tensors: dict[str, _Tensor] = {}
    places = []
    try:
        for name, item in json.loads(content[place][8 : 8 + length].tobytes()).items():
            if name == "__metadata__":
                continue
            dtype = np.dtype(_DTYPES[item["dtype"]])
            shape: tuple[int, ...] = tuple(operator.index(size) for size in item["shape"])
            start, stop = (first + operator.index(offset) for offset in item["data_offsets"])
            if min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name} does not fit its place")
            if start % dtype.itemsize:
                raise ValueError(f"tensor {name} is not aligned")
            tensors[name] = _Tensor(dtype, shape, start)
            places.append((start, stop))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a broken header: {error}") from None
    # Where one ends, the next one begins. This also keeps all of them inside of the file.
    places.sort()
    if [first, *(stop for _, stop in places)] != [*(start for start, _ in places), place.stop]:
        raise ValueError(f"{path} has a broken header: its tensors overlap, leave gaps or do not fit into the file")
    return tensors


# -- the lock ---------------------------------------------------------------------------------------------------------


def _acquire(folder: pathlib.Path) -> IO[str]:
    """The lock on a folder; the system frees it when the process ends, however it ends."""
    path = folder / _LOCK
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise BlockingIOError(errno.EWOULDBLOCK, f"somebody is writing to this zoo: {owner}", str(folder)) from None
    except OSError as error:
        file.close()
        raise OSError(error.errno, f"cannot lock this zoo ({error.strerror})", str(folder)) from None
    file.truncate(0)
    command = " ".join(sys.orig_argv)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started as: {command}\n")
    file.flush()
    return file
