"""A small training run, as a program of its own that can kill itself at a chosen moment.

    python small_run.py FOLDER MOMENT STEP

MOMENT is one of `batch`, `evaluate`, `commit` (the checkpoint of STEP is complete but not yet under
its final name), `delete` (the checkpoint of STEP is being deleted), `rewrite` (the metrics file is
being replaced) and `never`. A run that comes to its end writes its parameters to FOLDER/final.npz.
"""

import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ngjax import train

NUM_STEPS = 30
BATCH_SIZE = 16

_rng = np.random.default_rng(0)
INPUTS = _rng.normal(size=(100, 4)).astype(np.float32)
TARGETS = np.sin(INPUTS.sum(axis=1, keepdims=True))
rows_at = train.epoch_batches(len(INPUTS), BATCH_SIZE, seed=5)


def initial_params():
    rng = np.random.default_rng(1)
    return {
        "hidden": {"kernel": rng.normal(size=(4, 8)).astype(np.float32), "bias": np.zeros(8, np.float32)},
        "out": {"kernel": rng.normal(size=(8, 1)).astype(np.float32), "bias": np.zeros(1, np.float32)},
    }


def predict(params, inputs):
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def loss_fn(params, batch, key):
    noise = 0.1 * jax.random.normal(key, batch["inputs"].shape)
    errors = predict(params, batch["inputs"] + noise) - batch["targets"]
    return jnp.mean(errors**2), {"worst": jnp.max(jnp.abs(errors))}


def batch_at(step):
    rows = rows_at(step)
    return {"inputs": INPUTS[rows], "targets": TARGETS[rows]}


def evaluate(params):
    return {"mse": jnp.mean((predict(params, INPUTS) - TARGETS) ** 2)}


def arguments(**changes):
    """The run's arguments to `fit`, with some of them changed."""
    return {
        "loss_fn": loss_fn,
        "params": initial_params(),
        "batch_at": batch_at,
        "optimizer": optax.adam(train.learning_rate_schedule(0.01, warmup_steps=10)),
        "num_steps": NUM_STEPS,
        "key": jax.random.key(2),
        "evaluate": evaluate,
        "eval_every": 10,
        "log_every": 3,
        "save_every": 5,
        "keep": 2,
        **changes,
    }


def main(folder, moment, step):
    folder = pathlib.Path(folder)

    def reach(name, at=step):
        if (name, at) == (moment, step):
            os.kill(os.getpid(), signal.SIGKILL)

    removed_files = None

    def watch(event, args):
        nonlocal removed_files
        if event == "os.rename":
            target = pathlib.Path(os.fsdecode(args[1]))
            if target == folder / "checkpoints" / str(step):
                reach("commit")
            if target == folder / "metrics.jsonl":
                reach("rewrite")
        elif event == "shutil.rmtree":
            if pathlib.Path(os.fsdecode(args[0])) == folder / "checkpoints" / str(step):
                removed_files = 0
        elif event == "os.remove" and removed_files is not None:
            removed_files += 1
            if removed_files == 4:
                reach("delete")

    sys.addaudithook(watch)

    def watched_batch_at(done):
        reach("batch", done)
        return batch_at(done)

    def watched_evaluate(params):
        reach("evaluate")
        return evaluate(params)

    result = train.fit(
        **arguments(
            batch_at=watched_batch_at,
            evaluate=watched_evaluate,
            directory=folder,
            if_exists="resume",
        )
    )
    leaves = jax.tree.leaves_with_path(result.state.params)
    np.savez(folder / "final.npz", **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
