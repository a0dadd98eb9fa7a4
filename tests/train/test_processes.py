import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from ngjax import train
from tests.train import one_of_two, small_run

ROOT = pathlib.Path(__file__).parents[2]


def test_two_processes_end_as_one(tmp_path):
    """Each reads its half of every batch; both take part in saving, and one writes the metrics."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, one_of_two.__file__, str(port), str(index), str(tmp_path)],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            },
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    errors = [process.communicate()[1] for process in processes]
    if any(process.returncode for process in processes):
        pytest.fail("\n".join(errors))
    assert ["step 10/10" in error for error in errors] == [True, False]

    alone = train.fit(**small_run.arguments(num_steps=10)).state.params
    for index in range(2):
        with np.load(tmp_path / f"final-{index}.npz") as final:
            for path, leaf in jax.tree.leaves_with_path(alone):
                np.testing.assert_allclose(final[jax.tree_util.keystr(path)], leaf, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(final["steps"], [3, 5, 6, 9, 10])
    rows = train.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 5, 6, 9, 10]
