"""Reads the checkpoints that `torch.save` writes, without torch and without running what a pickle asks for.

Such a file is a zip archive: `<root>/data.pkl` holds a pickle in which tensors refer to storages by number, and
`<root>/data/<number>` the raw content of each storage. A pickle is a program that may call anything it can name. Here
it can name nothing but what tensors and plain containers are built from, and what it gets are not the functions of that
name but sealed records of what to build. Arrays are made from these afterwards, once every number in them is checked.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeGuard

import ml_dtypes
import numpy as np

_STORAGE_DTYPES: dict[str, np.dtype] = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "BoolStorage": np.dtype(np.bool_),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "ShortStorage": np.dtype(np.int16),
}
# Pickles of the format before torch 1.6 begin with this number.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAX_DIMENSIONS = 32
# Tensors may repeat elements of a storage (stride 0) or share one, so a small file can ask for any amount of memory.
_FREE_BYTES = 2**26
_MAX_GROWTH = 8


def load_torch_file(source: str | os.PathLike[str] | io.BufferedReader | io.BytesIO, *, name: str | None = None) -> Any:
    """What a checkpoint holds, with NumPy arrays in the place of tensors.

    Only tensors, dictionaries, lists, tuples, strings, bytes and numbers are read. Every array has memory of its own,
    in row-major order, whatever the strides of its tensor; one that the file holds in several places is one array.
    Dictionaries of any kind become `dict`, parameters and buffers plain arrays.

    Args:
      source: path of the file, or an open binary file that can seek.
      name: what to call the file in errors, by default its path.

    Raises:
      ValueError: not a whole checkpoint, one of the format before torch 1.6, one with numbers that do not fit together,
        or one whose pickle asks for anything else. The message names the file, the member and what was refused.
      OSError: the file cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            return _load(file, name or os.fspath(source))
    return _load(source, name or str(getattr(source, "name", "the file")))


def _load(file: io.BufferedReader | io.BytesIO, name: str) -> Any:
    if file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
        raise ValueError(
            f"{name} has the format that torch wrote before version 1.6, which is not read. If you trust the file, "
            "convert it with torch: torch.save(torch.load(old, weights_only=True), new)"
        )
    file.seek(0)
    with _zip_errors(name), zipfile.ZipFile(file) as archive:
        return _Checkpoint(archive, name).load()


@contextlib.contextmanager
def _zip_errors(where: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is not a whole zip archive: {error}") from None


class _Sealed:
    """Something a pickle may pass on but neither look into nor change."""

    __slots__ = ()

    def __setstate__(self, state: object) -> NoReturn:
        # A pickle's BUILD would set attributes, also those of functions and classes, if this were not here.
        raise ValueError(f"it sets attributes of a {type(self).__name__.strip('_').lower()}")


class _Function(_Sealed):
    """A function that a pickle may call."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


class _StorageType(_Sealed):
    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype


class _Storage(_Sealed):
    """A member of the archive, not yet read."""

    __slots__ = ("dtype", "key", "size")

    def __init__(self, dtype: np.dtype, key: str, size: int) -> None:
        self.dtype, self.key, self.size = dtype, key, size


class _Tensor(_Sealed):
    """Which elements of a storage a tensor consists of: element i is at offset + sum(i * strides)."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides


class _Dict(dict):
    """An ordered dictionary. Those of `Module.state_dict` carry an attribute with version numbers, which is dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict) or state.keys() - {"_metadata"}:
            raise ValueError("it sets attributes of a dictionary")


def _rebuild_tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object = False,
    backward_hooks: object = None,
    metadata: object = None,
) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError(f"a tensor has a {type(storage).__name__} in the place of its storage")
    if not _is_size(offset):
        raise ValueError(f"a tensor has the offset {offset!r}, expected a number of elements")
    if not (isinstance(shape, tuple) and isinstance(strides, tuple) and all(map(_is_size, (*shape, *strides)))):
        raise ValueError(
            f"a tensor has shape {shape!r} and strides {strides!r}, expected tuples of numbers of elements"
        )
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    if metadata:  # that its values are to be conjugated or negated
        raise ValueError(f"a tensor has the properties {metadata!r}, which are not read")
    end = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    if math.prod(shape) and end > storage.size:
        raise ValueError(
            f"a tensor of shape {list(shape)}, strides {list(strides)} and offset {offset} reaches up to element "
            f"{end} of storage {storage.key}, which has {storage.size}"
        )
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(data: object, requires_grad: object = True, backward_hooks: object = None) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise ValueError(f"a parameter has a {type(data).__name__} in the place of its tensor")
    return data


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _empty_dict(*args: object) -> _Dict:
    # Items follow by themselves. Arguments would be a way to call methods of whatever is passed.
    if args:
        raise ValueError("a dictionary is made with arguments, expected none")
    return _Dict()


def _size(*args: object) -> tuple[int, ...]:
    if len(args) != 1 or not isinstance(args[0], tuple) or not all(map(_is_size, args[0])):
        raise ValueError(f"torch.Size is called with {args!r}, expected one tuple of numbers of elements")
    return args[0]


_GLOBALS: dict[tuple[str, str], _Sealed] = {
    ("collections", "OrderedDict"): _Function(_empty_dict),
    ("torch", "Size"): _Function(_size),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
} | {("torch", storage): _StorageType(dtype) for storage, dtype in _STORAGE_DTYPES.items()}


class _RefusedGlobal(ValueError):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Sealed:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise _RefusedGlobal(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise ValueError(f"it refers to {pid!r}, expected ('storage', type, key, device, size)")
        _, kind, key, _, size = pid
        if not (isinstance(kind, _StorageType) and isinstance(key, str) and _is_size(size)):
            raise ValueError(f"it refers to storage {key!r} of size {size!r}, expected a type, a name and a number")
        return _Storage(kind.dtype, key, size)


def _unpickle(content: bytes, where: str) -> Any:
    try:
        for opcode, argument, _ in pickletools.genops(content):
            # The unpickler makes room for as many remembered objects as the highest number says.
            if opcode.name in ("PUT", "LONG_BINPUT") and isinstance(argument, int) and argument > len(content):
                raise ValueError(f"it remembers an object as number {argument}, in {len(content)} bytes")
            # These reach objects without asking `find_class`, or make room before they read.
            if opcode.name in ("EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER"):
                raise ValueError(f"it has the instruction {opcode.name}")
        return _Unpickler(io.BytesIO(content)).load()
    except _RefusedGlobal as error:
        raise ValueError(
            f"{where}: the pickle asks for {error}, which is refused: only tensors and plain containers are read. "
            "If you trust the file, load it with torch and save the state_dict alone"
        ) from None
    # A pickle that is no pickle, or a hostile one, fails in whatever way it happens to.
    except Exception as error:
        raise ValueError(f"{where}: the pickle cannot be read: {error or type(error).__name__}") from None


class _Checkpoint:
    """The reading of one archive."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self._archive = archive
        self._name = name
        self._members = {member.filename: member for member in archive.infolist()}
        if len(self._members) < len(archive.infolist()):
            raise ValueError(f"{name} has several members of one name")
        pickles = [member for member in self._members if member.endswith("/data.pkl") and member.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError(
                f"{name} is not a checkpoint of torch.save: expected one member <root>/data.pkl, "
                f"found {', '.join(pickles) or 'none'}"
            )
        self._root = pickles[0].removesuffix("data.pkl")
        self._storages: dict[str, np.ndarray] = {}
        self._bytes_left = _FREE_BYTES + _MAX_GROWTH * sum(member.file_size for member in self._members.values())
        # By identity: what was already converted (None: is being converted).
        self._converted: dict[int, Any] = {}

    def load(self) -> Any:
        self._byte_order = self._read_byte_order()
        member = f"{self._root}data.pkl"
        where = f"{self._name}, member {member}"
        value = _unpickle(self._read(member), where)
        try:
            return self._convert(value, where)
        except RecursionError:
            raise ValueError(f"{where}: containers are nested too deeply") from None

    def _read_byte_order(self) -> str:
        member = f"{self._root}byteorder"
        order = self._read(member) if member in self._members else b"little"  # files of torch before 2.1 have none
        if order not in (b"little", b"big"):
            raise ValueError(f"{self._name}, member {member}: expected little or big, found {order[:20]!r}")
        return order.decode()

    def _read(self, member: str) -> bytes:
        where = f"{self._name}, member {member}"
        info = self._members[member]
        if info.flag_bits & 0x1:
            raise ValueError(f"{where} is encrypted")
        # torch.save never compresses. Without compression a file of some size holds no more than that.
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{where} is compressed, expected it stored as it is")
        with _zip_errors(where):
            return self._archive.read(info)

    def _convert(self, value: Any, where: str) -> Any:
        """Plain containers and arrays for what the pickle made."""
        if value is None or isinstance(value, (bool, int, float, str, bytes)):
            return value
        if id(value) in self._converted:
            converted = self._converted[id(value)]
            if converted is None:
                raise ValueError(f"{where} holds itself")
            return converted
        self._converted[id(value)] = None
        if isinstance(value, dict):
            for key in value:
                if not (key is None or isinstance(key, (bool, int, float, str, bytes))):
                    raise ValueError(f"{where}: expected strings and numbers as keys, found a {_kind(key)}")
            converted = {key: self._convert(item, f"{where}[{key!r}]") for key, item in value.items()}
        elif isinstance(value, (list, tuple)):
            converted = [self._convert(item, f"{where}[{i}]") for i, item in enumerate(value)]
            converted = tuple(converted) if isinstance(value, tuple) else converted
        elif isinstance(value, _Tensor):
            converted = self._array(value, where)
        else:
            raise ValueError(f"{where} is a {_kind(value)}, expected tensors, containers, strings and numbers")
        self._converted[id(value)] = converted
        return converted

    def _array(self, tensor: _Tensor, where: str) -> np.ndarray:
        dtype = tensor.storage.dtype
        self._bytes_left -= math.prod(tensor.shape) * dtype.itemsize
        if self._bytes_left < 0:
            raise ValueError(
                f"{where}: with shape {list(tensor.shape)}, all tensors take far more memory than the file holds"
            )
        storage = self._read_storage(tensor.storage, where)
        if math.prod(tensor.shape) == 0:
            return np.empty(tensor.shape, dtype)
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides).copy(order="C")

    def _read_storage(self, storage: _Storage, where: str) -> np.ndarray:
        member = f"{self._root}data/{storage.key}"
        if member not in self._members:
            raise ValueError(f"{where}: its storage {member} is not in {self._name}")
        size = storage.size * storage.dtype.itemsize
        found = self._members[member].file_size
        if found != size:
            raise ValueError(
                f"{self._name}, member {member}: expected {size} bytes for {storage.size} elements of "
                f"{storage.dtype.name}, found {found}"
            )
        if member not in self._storages:
            self._storages[member] = np.frombuffer(self._read(member), np.uint8)
        content = self._storages[member]
        if self._byte_order != sys.byteorder:
            unit = storage.dtype.itemsize // (2 if storage.dtype.kind == "c" else 1)
            content = content.view(f"u{unit}").byteswap()
        return content.view(storage.dtype)


def _kind(value: object) -> str:
    return type(value).__name__.strip("_").lower()
