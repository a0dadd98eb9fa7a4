"""The folder of a run, and in it the last few states, any of which the run can continue from."""

import os
import pathlib
import shutil
import tempfile
import typing
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree
from orbax.checkpoint import v1 as ocp

IfExists: TypeAlias = Literal["refuse", "resume", "overwrite"]
"""What to do with a folder that already holds a run."""

METRICS_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints"


def prepare_folder(directory: str | os.PathLike[str], if_exists: IfExists = "refuse") -> pathlib.Path:
    """Makes the folder of a run, or finds the one to continue.

    Call it on every process; the folder must be one that all of them see.

    Args:
      directory: made if missing. Files of others in it are left alone.
      if_exists: for a folder that holds a run: `"refuse"` it, `"resume"` the run (a fresh one
        starts where there is none yet), or `"overwrite"`, which deletes the run's files.

    Returns:
      The absolute path.

    Raises:
      FileExistsError: the folder holds a run and `if_exists` is `"refuse"`.
      OSError: the folder cannot be made or written to.
      ValueError: an unknown `if_exists`.
    """
    if if_exists not in typing.get_args(IfExists):
        raise ValueError(f"if_exists={if_exists!r}, expected one of {typing.get_args(IfExists)}")
    folder = pathlib.Path(directory).absolute()
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Permission bits do not tell about read-only or full file systems; writing does.
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"\0")
        except OSError as error:
            raise OSError(f"cannot write to the run's folder {folder}: {error}") from error
        if any((folder / name).exists() for name in (METRICS_NAME, CHECKPOINTS_NAME)):
            if if_exists == "refuse":
                raise FileExistsError(
                    f"{folder} already holds a run: choose another folder, if_exists='resume' to "
                    "continue it, or if_exists='overwrite' to delete it"
                )
            if if_exists == "overwrite":
                _delete_run(folder)
    multihost_utils.sync_global_devices("ngjax.train.prepare_folder")
    return folder


def _delete_run(folder: pathlib.Path) -> None:
    # Renamed first: killed in between, no half-deleted checkpoint is left under its final name.
    doomed = folder / f"{CHECKPOINTS_NAME}.deleted"
    shutil.rmtree(doomed, ignore_errors=True)
    if (folder / CHECKPOINTS_NAME).exists():
        (folder / CHECKPOINTS_NAME).rename(doomed)
        shutil.rmtree(doomed)
    (folder / METRICS_NAME).unlink(missing_ok=True)


class Checkpoints:
    """Pytrees of arrays by step, written in the background, under their final name when complete.

    Args:
      directory: of the checkpoints and nothing else; made if missing.
      keep: how many of the latest to keep.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int) -> None:
        self.directory = pathlib.Path(directory).absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            # What a killed process was writing.
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Steps saved and not deleted again, in order."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, step: int, tree: PyTree) -> None:
        """Saves a tree as that of `step`; returns once its arrays may be donated.

        Waits for the save before it, and raises what that one failed with.
        """
        self._checkpointer.save_async(step, _named_leaves(tree), force=True)

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The tree of `step`; waits for a save in the background.

        Args:
          step: one of `steps`.
          like: the same tree of `jax.ShapeDtypeStruct` with the shardings to restore to.

        Raises:
          ValueError: the checkpoint holds other leaves, shapes or dtypes than `like`; the message
            names the folder and the leaves.
        """
        self._checkpointer.wait()
        self._check(step, like)
        loaded = self._checkpointer.load(step, abstract_state=_named_leaves(like))

        def pick(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> Array:
            if leaf.size == 0:
                return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
            return loaded[jax.tree_util.keystr(path)]

        return jax.tree.map_with_path(pick, like)

    def _check(self, step: int, like: PyTree) -> None:
        # Orbax would cast other dtypes silently and report other leaves or shapes as a handler it
        # cannot find.
        stored = {
            name: (tuple(leaf.shape), str(leaf.dtype))
            for name, leaf in self._checkpointer.metadata(step).metadata.items()
        }
        expected = {
            name: (leaf.shape, str(leaf.dtype)) for name, leaf in jax.eval_shape(_key_data, _named_leaves(like)).items()
        }
        # In the order of the tree, so that the parameters are named before what follows from them.
        names = [*_named_leaves(like), *sorted(stored.keys() - expected.keys())]
        differing = [name for name in names if stored.get(name) != expected.get(name)]
        if differing:
            listed = "; ".join(
                f"{name}: expected {_described(expected, name)}, found {_described(stored, name)}"
                for name in differing[:3]
            )
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ValueError(f"checkpoint {step} in {self.directory} is not of this run: {listed}{more}")

    def close(self) -> None:
        """Waits for the last save and raises what it failed with."""
        self._checkpointer.close()


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path: one flat dictionary restores without knowing any container's class.

    Arrays without elements hold nothing to save, and orbax refuses them.
    """
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if leaf.size}


def _key_data(leaves: dict[str, Array]) -> dict[str, Array]:
    """Random keys as the integers that are stored for them."""
    return {
        name: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for name, leaf in leaves.items()
    }


def _described(leaves: dict[str, tuple[tuple[int, ...], str]], name: str) -> str:
    if name not in leaves:
        return "none"
    shape, dtype = leaves[name]
    return f"{dtype}{list(shape)}"
