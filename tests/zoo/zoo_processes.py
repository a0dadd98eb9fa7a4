"""Processes that write, are killed, and read zoos.

    python zoo_processes.py killed FOLDER   kill writers at every moment of an append
    python zoo_processes.py hold FOLDER     hold the lock until killed
    python zoo_processes.py share FOLDER    one process appends while others read

Children are forked, so that importing everything happens once.
"""

import itertools
import json
import os
import pathlib
import pickle
import signal
import sys
import time

import numpy as np

import ngjax
from ngjax import zoo

SPEC = ngjax.mlp_spec((2, 3, 1), activation="siren")
METADATA = {"made_by": "a test"}


def numbered(first, count):
    """Networks all of whose parameters are their number, and labels that say it too."""
    numbers = np.arange(first, first + count)
    leaves = [
        np.broadcast_to(numbers.reshape(-1, *[1] * len(param.shape)), (count, *param.shape)).astype(np.float32)
        for param in SPEC.params
    ]
    return SPEC.unflatten(leaves), {"number": numbers.astype(np.int32)}


def is_numbered(zoo_, rows):
    leaves = SPEC.flatten(zoo_.read(rows))
    return np.array_equal(zoo_.labels["number"], np.arange(len(zoo_))) and all(
        np.array_equal(leaf, np.broadcast_to(np.reshape(rows, (-1, *[1] * (leaf.ndim - 1))), leaf.shape))
        for leaf in leaves
    )


# -- killed -----------------------------------------------------------------------------------------------------------


def kill_at(moment):
    """From now on, what this process does to files ends with its death at event number `moment`.

    Events lie before and after each call, and in the middle of what is written.
    """
    events = itertools.count()

    def event():
        if next(events) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(function):
        def call(*arguments, **options):
            event()
            result = function(*arguments, **options)
            event()
            return result

        return call

    def in_two_parts(function, mode):
        def write(path, content, **options):
            event()
            with path.open(mode) as file:
                file.write(content[: len(content) // 2])
            event()
            return function(path, content, **options)

        return write

    for name in ("fsync", "replace"):
        setattr(os, name, wrapped(getattr(os, name)))
    pathlib.Path.write_bytes = in_two_parts(pathlib.Path.write_bytes, "wb")
    pathlib.Path.write_text = in_two_parts(pathlib.Path.write_text, "w")
    pathlib.Path.unlink = wrapped(pathlib.Path.unlink)


def append_and_die(folder, moment):
    with zoo.ZooWriter(folder, metadata=METADATA) as writer:
        kill_at(moment)
        writer.append(SPEC, *numbered(len(writer), 4))


def create_and_die(folder, moment):
    kill_at(moment)
    with zoo.ZooWriter(folder, metadata=METADATA):
        pass


def in_child(function, *arguments):
    """Whether the function ended, rather than its process."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        raise RuntimeError("a child failed")
    return status == 0


def killed(folder):
    """Prints the number of networks before and after each kill."""
    for moment in itertools.count():
        if in_child(create_and_die, folder / f"new-{moment}", moment):
            break
        with zoo.ZooWriter(folder / f"new-{moment}", metadata=METADATA) as writer:
            writer.append(SPEC, *numbered(0, 2))
    lengths = []
    with zoo.ZooWriter(folder / "zoo", metadata=METADATA) as writer:
        writer.append(SPEC, *numbered(0, 2))
    for moment in itertools.count():
        before = len(zoo.open(folder / "zoo"))
        survived = in_child(append_and_die, folder / "zoo", moment)
        after = zoo.open(folder / "zoo")
        after.verify()
        if not is_numbered(after, np.arange(len(after))):
            raise RuntimeError(f"killed at {moment}, the zoo holds something else")
        lengths.append((before, len(after)))
        # The next writer goes on where this one ended.
        with zoo.ZooWriter(folder / "zoo", metadata=METADATA) as writer:
            files = {path.name for path in (folder / "zoo").iterdir() if path.name.startswith(".")}
            if files != {".lock"}:
                raise RuntimeError(f"left over: {files}")
            writer.append(SPEC, *numbered(len(writer), 1))
        if survived:
            break
    print(json.dumps({"created": len(list(folder.glob("new-*"))), "lengths": lengths}))


# -- together ---------------------------------------------------------------------------------------------------------


def hold(folder):
    with zoo.ZooWriter(folder, metadata=METADATA):
        print("holding", flush=True)
        time.sleep(600)


def read_until(folder, count, inherited):
    """Opens the zoo again and again and reads some of it, until it holds `count` networks."""
    rng = np.random.default_rng(os.getpid())
    length = 0
    while length < count:
        for opened in (zoo.open(folder), inherited, pickle.loads(pickle.dumps(inherited))):
            if not is_numbered(opened, rng.integers(len(opened), size=20)):
                raise RuntimeError("read something that was not written")
        if len(inherited) != 2:
            raise RuntimeError("an open zoo grew")
        opened = zoo.open(folder)
        if len(opened) < length:
            raise RuntimeError("the zoo became shorter")
        length = len(opened)


def share(folder):
    with zoo.ZooWriter(folder, metadata=METADATA) as writer:
        writer.append(SPEC, *numbered(0, 2))
        inherited = zoo.open(folder)
        readers = []
        for _ in range(3):
            readers.append(os.fork())
            if readers[-1] == 0:
                try:
                    read_until(folder, 92, inherited)
                except BaseException as error:
                    print(repr(error), file=sys.stderr, flush=True)
                    os._exit(1)
                os._exit(0)
        for _ in range(30):
            writer.append(SPEC, *numbered(len(writer), 3))
        sleeper = os.fork()
        if sleeper == 0:
            signal.pause()
    # The writer is done, though a child still has everything open that it had.
    try:
        with zoo.ZooWriter(folder) as writer:
            writer.append(SPEC, *numbered(len(writer), 1))
    finally:
        os.kill(sleeper, signal.SIGKILL)
        os.waitpid(sleeper, 0)
    codes = [os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) for reader in readers]
    print(json.dumps({"codes": codes}))


if __name__ == "__main__":
    {"killed": killed, "hold": hold, "share": share}[sys.argv[1]](pathlib.Path(sys.argv[2]))
