import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from ngjax import train
from tests.train import small_run

ROOT = pathlib.Path(__file__).parents[2]


def run(folder, moment="never", step=0):
    """Exit status of `small_run` as a process of its own."""
    finished = subprocess.run(
        [sys.executable, small_run.__file__, str(folder), moment, str(step)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if finished.returncode not in (0, -signal.SIGKILL):
        pytest.fail(finished.stderr)
    return finished.returncode


def rows_without_time(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["time"]
    return rows


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder of the run that is never killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(folder) == 0
    return folder


def assert_same_end(folder, uninterrupted):
    with np.load(folder / "final.npz") as ours, np.load(uninterrupted / "final.npz") as theirs:
        assert sorted(ours) == sorted(theirs)
        for name in ours:
            assert ours[name].tobytes() == theirs[name].tobytes(), name
    assert rows_without_time(folder) == rows_without_time(uninterrupted)


def test_killed_again_and_again_ends_as_if_never_killed(tmp_path, uninterrupted):
    """Each line is the moment of a real SIGKILL; the next start continues on the same folder."""
    moments = [
        ("batch", 0),  # before anything was saved
        ("commit", 10),  # the checkpoint is written, but not under its final name
        ("rewrite", 0),  # the metrics past the restored step are being dropped
        ("delete", 10),  # an old checkpoint is half gone
        ("commit", 30),  # the last one
    ]
    for moment, step in moments:
        assert run(tmp_path, moment, step) == -signal.SIGKILL, (moment, step)
        assert not (tmp_path / "final.npz").exists()
    assert run(tmp_path) == 0
    assert_same_end(tmp_path, uninterrupted)


def test_metrics_have_each_logged_step_once(uninterrupted):
    rows = rows_without_time(uninterrupted)
    # Every third, every evaluation, the last.
    assert [row["step"] for row in rows] == [3, 6, 9, 10, 12, 15, 18, 20, 21, 24, 27, 30]
    assert [row["step"] for row in rows if "eval/mse" in row] == [10, 20, 30]


def test_a_finished_run_is_returned_as_it_is(uninterrupted):
    def must_not_be_called(_):
        raise AssertionError

    result = train.fit(
        **small_run.arguments(
            batch_at=must_not_be_called,
            evaluate=must_not_be_called,
            directory=uninterrupted,
            if_exists="resume",
        )
    )
    assert int(result.state.step) == small_run.NUM_STEPS
    assert len(result.history) == 12
    with np.load(uninterrupted / "final.npz") as final:
        for path, leaf in jax.tree.leaves_with_path(result.state.params):
            assert final[jax.tree_util.keystr(path)].tobytes() == np.asarray(leaf).tobytes()


def test_history_of_a_resumed_run_is_the_whole_file(tmp_path):
    arguments = small_run.arguments(directory=tmp_path, if_exists="resume", eval_every=None)
    train.fit(**{**arguments, "num_steps": 7})
    result = train.fit(**{**arguments, "num_steps": 13})
    assert [row["step"] for row in result.history] == [3, 6, 7, 9, 12, 13]
    assert result.history == train.read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": 3}, "another key"),
        ({"num_steps": 2}, "holds a run of 5 steps"),
        ({"params": {"w": 4}}, r"params\['w'\]: expected float32\[4\], found none"),
    ],
    ids=["key", "num_steps", "params"],
)
def test_refuses_to_continue_another_run(tmp_path, changes, message):
    folder = tmp_path / "run"
    train.fit(**small_run.arguments(directory=folder, num_steps=5))
    made = {
        "key": jax.random.key,
        "num_steps": int,
        "params": lambda sizes: {name: np.zeros(n, np.float32) for name, n in sizes.items()},
    }
    changes = {name: made[name](value) for name, value in changes.items()}
    with pytest.raises(ValueError, match=message) as error:
        train.fit(**small_run.arguments(directory=folder, if_exists="resume", **changes))
    assert str(folder) in str(error.value)
