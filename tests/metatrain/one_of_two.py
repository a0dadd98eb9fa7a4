"""One of two processes of four devices each that meta-train the optimizers of `test_loop` together.

    python one_of_two.py PORT INDEX FOLDER

Trains to step 4 and, continued from the checkpoint, to step 9.
"""

import pathlib
import sys

import jax
import numpy as np


def main(port, index, folder):
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    # Only now, as it makes arrays, which starts JAX.
    from tests.metatrain import test_loop

    for num_steps in (4, 9):
        result = test_loop.run(num_steps, devices=8, directory=folder, if_exists="resume")
    np.savez(pathlib.Path(folder) / f"final-{index}.npz", steps=[row["step"] for row in result.history], **result.theta)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
