"""What a result has to say of the machine it comes from."""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
from typing import Any

import jax


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
