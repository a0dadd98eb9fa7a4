import contextlib
import errno
import json
import mmap
import os
import pathlib
import resource
import stat

import numpy as np
import pytest

from ngjax.files import map_files, write_atomically, write_json


@contextlib.contextmanager
def largest_file(size):
    """Files of this process cannot grow beyond `size` bytes: the closest to a full disk that needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [True, False])
def test_the_file_has_its_name_when_the_block_ends(existing, tmp_path):
    path = tmp_path / "results.json"
    if existing:
        path.write_text("old")
    with write_atomically(path) as unfinished:
        assert unfinished.parent == path.parent
        assert unfinished.suffix == ".json"  # programs that go by it write the same kind of file
        unfinished.write_text("new")
        assert (path.read_text() == "old") if existing else not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_names_may_be_text_and_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with write_atomically("results") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "results").read_text() == "new"


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_a_failure_leaves_the_old_file_and_nothing_else(failure, tmp_path):
    path = tmp_path / "results"
    path.write_text("old")

    def write():
        with write_atomically(path) as unfinished:
            unfinished.write_text("half")
            raise failure

    with pytest.raises(type(failure)) as caught:
        write()
    assert caught.value is failure
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_with_the_file(tmp_path):
    path = tmp_path / "results"

    def write():
        with write_atomically(path) as unfinished:
            unfinished.write_bytes(bytes(20_000))

    with largest_file(10_000), pytest.raises(OSError, match=f"'{path}'") as caught:
        write()
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []
    write()
    assert path.stat().st_size == 20_000


def test_all_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a machine that loses power keeps the name and not the content."""
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        events.append(("synced", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def recorded_replace(source, target):
        events.append(("renamed", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    with write_atomically(tmp_path / "results") as unfinished:
        unfinished.write_text("new")
        assert events == []
    file, folder = (tmp_path / "results").stat().st_ino, tmp_path.stat().st_ino
    assert events == [("synced", file), ("renamed", file), ("synced", folder)]


@pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_folders_that_cannot_be_synced_are_no_failure(code, raises, tmp_path, monkeypatch):
    fsync = os.fsync

    def failing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    failure = pytest.raises(OSError, match="results") if raises else contextlib.nullcontext()
    with failure, write_atomically(tmp_path / "results") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "results").read_text() == "new"


def test_two_at_once_do_not_mix(tmp_path):
    path = tmp_path / "results"
    with write_atomically(path) as first:
        first.write_text("first")
        with write_atomically(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_a_folder_that_is_missing_is_named(tmp_path):
    def write():
        with write_atomically(tmp_path / "nowhere" / "file") as unfinished:
            unfinished.write_text("")

    with pytest.raises(FileNotFoundError, match="nowhere"):
        write()


def test_json_is_whole_and_knows_no_infinity(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"loss": [1.5, None]})
    assert json.loads(path.read_text()) == {"loss": [1.5, None]}
    assert path.read_text().endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": [1.5, None]}
    assert list(tmp_path.iterdir()) == [path]


# -- mapping ----------------------------------------------------------------------------------------------------------


def write_files(folder, *contents):
    paths = [folder / f"file_{number}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def open_files():
    return len(list(pathlib.Path("/dev/fd").iterdir()))


def test_the_bytes_of_all_files_are_in_one_array(tmp_path):
    contents = [b"abc", b"", bytes(range(256)) * 40, b"x" * mmap.PAGESIZE, b"end"]
    array, places = map_files(write_files(tmp_path, *contents))
    assert [array[place].tobytes() for place in places] == contents
    assert array.size % mmap.PAGESIZE == 0
    used = np.zeros(array.size, bool)
    for place in places:
        assert place.start % mmap.PAGESIZE == 0
        used[place] = True
    assert not array[~used].any()


def test_no_files_and_empty_files_are_no_bytes(tmp_path):
    assert map_files([])[0].shape == (0,)
    array, places = map_files(write_files(tmp_path, b"", b""))
    assert array.shape == (0,)
    assert places == [slice(0, 0)] * 2


def test_mapped_bytes_cannot_be_written(tmp_path):
    array, places = map_files(write_files(tmp_path, b"abc"))
    for view in (array, array[places[0]], array.view(np.float32)):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True


def test_files_are_not_kept_open(tmp_path):
    paths = write_files(tmp_path, *[b"abc"] * 50)
    before = open_files()
    array, _ = map_files(paths)
    assert open_files() == before
    for path in paths:
        path.unlink()
    assert array[:3].tobytes() == b"abc"


def test_the_memory_is_given_back_with_the_last_view(tmp_path):
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists what is mapped")
    paths = write_files(tmp_path, b"abc", b"def")
    array, places = map_files(paths)
    view = array[places[1]].view()
    del array
    assert view.tobytes() == b"def"
    assert str(paths[0]) in maps.read_text()
    del view
    assert str(tmp_path) not in maps.read_text()


def test_a_missing_file_is_named_and_nothing_stays_mapped(tmp_path):
    paths = write_files(tmp_path, b"abc")
    with pytest.raises(FileNotFoundError, match="other"):
        map_files([*paths, tmp_path / "other"])
    with pytest.raises(OSError, match=str(tmp_path)):
        map_files([tmp_path])
