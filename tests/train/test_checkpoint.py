import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngjax import train


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


@pytest.fixture
def tree():
    """Containers, dtypes and shapes that a state may have, on every device."""
    leaves = {
        "kernel": jnp.arange(6.0).reshape(2, 3),
        "half": jnp.ones(4, jnp.bfloat16),
        "nested": (jnp.zeros((), jnp.int32), [jnp.zeros((0, 3))], {}, None),
        "a/b": jnp.ones(2),
        "key": jax.random.key(3),
    }
    return train.replicate(leaves, train.data_mesh())


@pytest.fixture
def checkpoints(tmp_path):
    opened = train.Checkpoints(tmp_path / "checkpoints", keep=2)
    yield opened
    opened.close()


def same(ours, theirs):
    def bits(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), ours, theirs)
    assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.sharding), ours) == jax.tree.map(
        lambda leaf: (leaf.dtype, leaf.sharding), theirs
    )


def test_round_trip(checkpoints, tree):
    checkpoints.save(3, tree)
    same(checkpoints.restore(3, abstract(tree)), tree)


def test_keeps_the_latest(checkpoints, tree):
    for step in range(1, 6):
        checkpoints.save(step, tree)
    checkpoints.close()
    assert sorted(os.listdir(checkpoints.directory)) == ["4", "5"]


def test_arrays_may_be_donated_once_save_returns(checkpoints):
    increment = jax.jit(lambda leaf: leaf + 1, donate_argnums=0)
    leaf = train.replicate(jnp.zeros((512, 512)), train.data_mesh())
    like = abstract(leaf)
    checkpoints.save(0, leaf)
    for _ in range(5):
        leaf = increment(leaf)
    np.testing.assert_array_equal(checkpoints.restore(0, like), 0)


def test_what_a_kill_leaves_is_no_checkpoint(checkpoints, tree):
    """A write that did not finish and a deletion that did not, as seen by the next process."""
    for step in (1, 2):
        checkpoints.save(step, tree)
    checkpoints.close()
    (checkpoints.directory / "7.orbax-checkpoint-tmp").mkdir()
    for file in (checkpoints.directory / "1").iterdir():
        if file.is_file():
            file.unlink()
    reopened = train.Checkpoints(checkpoints.directory, keep=2)
    assert reopened.steps[-1] == 2
    same(reopened.restore(2, abstract(tree)), tree)
    for step in (3, 4):
        reopened.save(step, tree)
    reopened.close()
    assert sorted(os.listdir(checkpoints.directory)) == ["3", "4"]


@pytest.mark.parametrize(
    ("name", "leaf", "message"),
    [
        ("kernel", jnp.zeros((3, 3)), r"\['kernel'\]: expected float32\[3, 3\], found float32\[2, 3\]"),
        ("half", jnp.ones(4), r"\['half'\]: expected float32\[4\], found bfloat16\[4\]"),
        ("new", jnp.ones(4), r"\['new'\]: expected float32\[4\], found none"),
        ("half", None, r"\['half'\]: expected none, found bfloat16\[4\]"),
    ],
    ids=["shape", "dtype", "missing", "unknown"],
)
def test_another_tree_is_refused_by_leaf(checkpoints, tree, name, leaf, message):
    checkpoints.save(3, tree)
    like = abstract(train.replicate({**tree, name: leaf}, train.data_mesh()))
    with pytest.raises(ValueError, match=message) as error:
        checkpoints.restore(3, like)
    assert str(checkpoints.directory) in str(error.value)


def test_folder_is_made(tmp_path):
    folder = train.prepare_folder(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b"
    assert list(folder.iterdir()) == []


def test_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"cannot write to the run's folder {tmp_path}/file/run"):
        train.prepare_folder(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=f"cannot write to the run's folder {tmp_path}"):
        train.prepare_folder(tmp_path)


@pytest.fixture(params=["metrics.jsonl", "checkpoints"])
def folder_of_a_run(request, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    if request.param == "checkpoints":
        (tmp_path / "checkpoints" / "3").mkdir(parents=True)
        (tmp_path / "checkpoints" / "3" / "_METADATA").touch()
    else:
        (tmp_path / "metrics.jsonl").touch()
    return tmp_path


def test_folder_of_a_run_is_refused(folder_of_a_run):
    with pytest.raises(FileExistsError, match=f"{folder_of_a_run} already holds a run.*if_exists"):
        train.prepare_folder(folder_of_a_run)
    assert len(list(folder_of_a_run.iterdir())) == 2


def test_overwriting_deletes_the_run_and_nothing_else(folder_of_a_run):
    # Left by a process that was killed while it overwrote.
    (folder_of_a_run / "checkpoints.deleted").mkdir()
    train.prepare_folder(folder_of_a_run, "overwrite")
    assert [entry.name for entry in folder_of_a_run.iterdir()] == ["notes.txt"]


def test_resuming_leaves_everything(folder_of_a_run):
    train.prepare_folder(folder_of_a_run, "resume")
    assert len(list(folder_of_a_run.iterdir())) == 2


def test_unknown_choice(tmp_path):
    with pytest.raises(ValueError, match="if_exists='replace'"):
        # Past the checks that the tests put on annotated types.
        train.prepare_folder.__wrapped__(tmp_path, "replace")
