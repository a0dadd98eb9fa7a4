"""One of two processes of four devices each that train the small run together.

    python one_of_two.py PORT INDEX FOLDER

Trains to step 5 and, continued from the checkpoint, to step 10.
"""

import pathlib
import sys

import jax
import numpy as np

from ngjax import train
from tests.train import small_run


def local_batch_at(step):
    rows = small_run.rows_at(step)[train.local_rows(small_run.BATCH_SIZE)]
    return {"inputs": small_run.INPUTS[rows], "targets": small_run.TARGETS[rows]}


def main(port, index, folder):
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    arguments = small_run.arguments(
        batch_at=local_batch_at,
        directory=folder,
        if_exists="resume",
        save_every=None,
        save_every_seconds=1e9,
        eval_every=None,
    )
    train.fit(**{**arguments, "num_steps": 5})
    result = train.fit(**{**arguments, "num_steps": 10})
    leaves = jax.tree.leaves_with_path(result.state.params)
    np.savez(
        pathlib.Path(folder) / f"final-{index}.npz",
        steps=[row["step"] for row in result.history],
        **{jax.tree_util.keystr(path): leaf for path, leaf in leaves},
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
