"""Files that appear whole or not at all, and files as arrays."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import mmap
import os
import pathlib
import secrets
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

UNFINISHED = ".unfinished-"
"""How the names of files begin that are being written; a killed process leaves one behind."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10  # on Linux and macOS; the module mmap does not have it


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A path to write to, whose file is on disk under the name `path` once the block ends.

    Whatever goes wrong before, the file that had this name is left as it was, and nothing else stays behind. Killed,
    the process leaves a file whose name begins with `UNFINISHED`. Two at once do not mix: the last one wins.

    Args:
      path: of the file, which may exist. The path to write to is in the same folder and ends like it.

    Raises:
      OSError: the folder cannot be written to, or the disk is full.
    """
    path = pathlib.Path(path)
    unfinished = path.with_name(f"{UNFINISHED}{secrets.token_hex(4)}-{path.name}")
    try:
        yield unfinished
        _sync(unfinished)
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # what went wrong first is what matters
            unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)  # a full disk does not say where
        raise
    try:
        _sync(path.parent)
    except OSError as error:
        # The file is complete; only its name could be lost with the machine. Some file systems do not sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            error.filename = os.fspath(path)
            raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes what JSON can hold; a file of that name is replaced at once or not at all.

    Raises:
      ValueError: a number that is not finite, which JSON does not know.
      TypeError: something else that JSON does not know.
      OSError: see `write_atomically`.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with write_atomically(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def map_files(paths: Sequence[str | os.PathLike[str]]) -> tuple[UInt8[np.ndarray, " bytes"], list[slice]]:
    """The bytes of files as one array, read from disk when they are looked at; not writable.

    Other than `mmap.mmap` and `np.memmap` it keeps no file open, so that there may be more of them than a process may
    have open files, and one gather reaches into all of them. The memory is given back with the last array that looks
    into it.

    Args:
      paths: of the files, which must not become shorter as long as the array is used.

    Returns:
      The array, and where in it each file is. Each begins on a page of its own; what is between them is zero.

    Raises:
      OSError: a file is missing or cannot be mapped.
    """
    sizes = [os.stat(path).st_size for path in paths]
    pages = [-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes]
    starts = list(itertools.accumulate(pages, initial=0))
    places = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    if starts[-1] == 0:
        return np.empty(0, np.uint8), places
    address = _LIBC.mmap(None, starts[-1], mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1, 0)
    _check_mapped(address, "address space")
    memory = (ctypes.c_uint8 * starts[-1]).from_address(address)
    # Not when the interpreter ends: other threads may still be reading, and the system cleans up anyway.
    weakref.finalize(memory, _LIBC.munmap, address, starts[-1]).atexit = False
    for path, place in zip(paths, places, strict=True):
        with pathlib.Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != place.stop - place.start:
                raise OSError(errno.ESTALE, "changed while it was opened", os.fspath(path))
            if size:
                flags = mmap.MAP_SHARED | _MAP_FIXED
                _check_mapped(
                    _LIBC.mmap(address + place.start, size, mmap.PROT_READ, flags, file.fileno(), 0), os.fspath(path)
                )
    # Read-only as a buffer too: numpy would let users switch writing on again, and the system kills who writes.
    return np.frombuffer(memoryview(memory).toreadonly(), np.uint8), places


def _check_mapped(address: int | None, what: str) -> None:
    if address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
