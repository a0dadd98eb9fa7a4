"""Files of a zip or tar archive or of a folder, read one by one without unpacking."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pathlib
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Container, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

_TAR_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError)


@runtime_checkable
class Files(Protocol):
    """The files in one place.

    Attributes:
      path: of the archive or folder.
      names: of the files, with `/` between folders, sorted.
    """

    path: pathlib.Path
    names: list[str]

    def read(self, name: str, *, limit: int) -> bytes:
        """The content of a file.

        Raises:
          ValueError: it is longer than `limit`, or the archive is broken there.
        """

    def fingerprint(self) -> dict[str, object]:
        """Name and hash: what tells that this is the same archive, or a folder with the same files."""


@contextlib.contextmanager
def open_files(path: str | os.PathLike[str]) -> Iterator[Files]:
    """The files of a zip archive, of a tar archive without compression, or of a folder.

    Raises:
      FileNotFoundError: there is no such archive or folder.
      ValueError: neither of them, one that is cut short or compressed as a whole, or one with a name that is there
        twice or points outside of it.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        yield _Folder(path)
        return
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(0)
        for magic, compression in _COMPRESSED.items():
            if start.startswith(magic):
                raise ValueError(
                    f"{path} is compressed with {compression}, which does not allow to read single files: decompress it"
                )
        is_zip = start.startswith(b"PK")
        with _archive_errors(str(path), "zip" if is_zip else "zip or tar"):
            files: Files = _Zip(path, zipfile.ZipFile(file)) if is_zip else _Tar(path, file)
        yield files


@contextlib.contextmanager
def _archive_errors(where: str, kind: str) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise ValueError(f"{where} is not a whole {kind} archive: {error or type(error).__name__}") from None


def check_member_name(path: pathlib.Path, name: str, known: Container[str] = ()) -> None:
    """That a member's name is relative, stays inside of the archive and is not among the known ones.

    Nothing is ever written under these names, but an archive with such a name is not what it claims to be.

    Raises:
      ValueError: the name is one of these.
    """
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise ValueError(f"{path}: member {name!r} points outside of the archive")
    if name in known:
        raise ValueError(f"{path}: member {name!r} is there twice")


def _check_size(where: str, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"{where} has {size} bytes, expected at most {limit}")


def _file_fingerprint(path: pathlib.Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


class _Folder:
    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.names = sorted(
            os.path.relpath(os.path.join(folder, file), path).replace(os.sep, "/")
            for folder, _, files in os.walk(path)
            for file in files
        )

    def read(self, name: str, *, limit: int) -> bytes:
        with (self.path / name).open("rb") as file:
            content = file.read(limit + 1)
        _check_size(f"{self.path / name}", len(content), limit)
        return content

    def fingerprint(self) -> dict[str, object]:
        listing = hashlib.sha256()
        # Of networks alone: the zoo that is made of them may be inside.
        for name in (name for name in self.names if name.endswith(".pth")):
            listing.update(f"{name}\0{(self.path / name).stat().st_size}\n".encode())
        return {"folder": self.path.resolve().name, "sha256_of_names_and_sizes": listing.hexdigest()}


class _Zip:
    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._archive = archive
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            check_member_name(path, member.filename, self._members)
            if not member.is_dir():
                self._members[member.filename] = member
        self.names = sorted(self._members)

    def read(self, name: str, *, limit: int) -> bytes:
        member, where = self._members[name], f"{self.path}, member {name}"
        _check_size(where, member.file_size, limit)
        if member.flag_bits & 0x1:
            raise ValueError(f"{where} is encrypted")
        with _archive_errors(where, "zip"):
            return self._archive.read(member)

    def fingerprint(self) -> dict[str, object]:
        return _file_fingerprint(self.path)


class _Place(NamedTuple):
    start: int
    size: int


class _Tar:
    def __init__(self, path: pathlib.Path, file: io.BufferedReader) -> None:
        self.path = path
        self._file = file
        self._places: dict[str, _Place] = {}
        end = 0
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                # It keeps all members otherwise: a gigabyte for a million of them.
                archive.members = []  # type: ignore[attr-defined]
                name = posixpath.normpath(member.name) if not member.name.startswith("/") else member.name
                check_member_name(path, member.name)
                check_member_name(path, name, self._places)
                if member.isdir():
                    size = 0
                elif member.isreg() and not member.issparse():
                    size = member.size
                    self._places[name] = _Place(member.offset_data, size)
                else:
                    raise ValueError(f"{path}: member {member.name!r} is a link or a device, expected a file")
                end = member.offset_data + -(-size // _TAR_BLOCK) * _TAR_BLOCK
        # Reading just stops where a header is missing or broken. An archive that is whole ends with zeros.
        file.seek(end)
        if file.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
            raise ValueError(f"{path} is not a whole tar archive: its end is missing after byte {end}")
        self.names = sorted(self._places)

    def read(self, name: str, *, limit: int) -> bytes:
        start, size = self._places[name]
        _check_size(f"{self.path}, member {name}", size, limit)
        self._file.seek(start)
        content = self._file.read(size)
        if len(content) < size:
            raise ValueError(f"{self.path}, member {name}: expected {size} bytes, found {len(content)}")
        return content

    def fingerprint(self) -> dict[str, object]:
        return _file_fingerprint(self.path)
