"""What a result has to say of the machine it comes from."""

from __future__ import annotations

import contextlib
import datetime
import os
import pathlib
import platform
import shlex
import sys
from typing import Any

import jax

from ngjax.version import __version__


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """Of the CPU, as its maker calls it where the system says so."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    """Processor, cores and the kind of device that JAX computes on, for results files."""
    return {"processor": processor_name(), "cores": available_cores(), "device": jax.devices()[0].device_kind}


def describe_versions() -> dict[str, str]:
    """Of this library, of jax and of Python."""
    return {"ngjax": __version__, "jax": jax.__version__, "python": platform.python_version()}


def describe_process() -> dict[str, Any]:
    """Machine, versions, date and command of this process, for results files."""
    return {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
