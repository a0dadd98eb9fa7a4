"""Checkpoints in the layout of `torch.save`, made by hand, whole and broken ones."""

import collections
import io
import struct
import zipfile
from typing import Any, NamedTuple

import numpy as np

KINDS = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}


class Raw(NamedTuple):
    """Opcodes as they are."""

    code: bytes


class Global(NamedTuple):
    """What a pickle imports by its name."""

    module: str
    name: str


class Call(NamedTuple):
    """What a pickle calls, and with what."""

    function: Any
    arguments: tuple


class Storage(NamedTuple):
    """A reference to the raw numbers of member `data/<key>`."""

    key: Any
    kind: Any
    size: Any


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def tensor(storage, offset, size, stride):
    return Call(REBUILD, (storage, offset, size, stride, False, collections.OrderedDict()))


def pickled(value):
    """The opcodes of protocol 2 that leave `value` on the stack."""
    match value:
        case Raw(code):
            return code
        case Global(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, arguments):
            return pickled(function) + pickled(tuple(arguments)) + b"R"
        case Storage(key, kind, size):
            kind = Global("torch", kind) if isinstance(kind, str) else kind
            return pickled(("storage", kind, key, "cpu", size)) + b"Q"
        case None:
            return b"N"
        case True | False:
            return b"\x88" if value else b"\x89"
        case int():
            content = value.to_bytes(9, "little", signed=True)
            return b"\x8a\x09" + content
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            content = value.encode()
            return b"X" + struct.pack("<I", len(content)) + content
        case dict():
            empty = b"ccollections\nOrderedDict\n)R" if isinstance(value, collections.OrderedDict) else b"}"
            return empty + b"".join(pickled(key) + pickled(item) + b"s" for key, item in value.items())
        case list():
            return b"]" + b"".join(pickled(item) + b"a" for item in value)
        case tuple():
            return b"(" + b"".join(map(pickled, value)) + b"t"
    raise TypeError(type(value))


def archive(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def checkpoint(value, storages=None, *, root="archive", **extra):
    """A file with the pickle of `value` and the given content of each storage."""
    members = {"data.pkl": b"\x80\x02" + pickled(value) + b".", "byteorder": b"little"}
    members |= {f"data/{key}": bytes(content) for key, content in (storages or {}).items()}
    members |= extra
    return archive({f"{root}/{name}": content for name, content in members.items() if content is not None})


def state_dict(arrays, *, root="archive"):
    """A file with an ordered dictionary of arrays, and of other values as they are."""
    values, storages = collections.OrderedDict(), {}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            values[name] = array
            continue
        key = str(len(storages))
        strides = tuple(stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides)
        storages[key] = array.tobytes()
        values[name] = tensor(Storage(key, KINDS[array.dtype.name], array.size), 0, array.shape, strides)
    return checkpoint(values, storages, root=root)


def encrypted(content):
    """A zip archive with the mark of encryption on every member."""
    content = bytearray(content)
    for signature, position in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(signature, at + 1)) >= 0:
            content[at + position] |= 1
    return bytes(content)
