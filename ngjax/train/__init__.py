"""Training: one step, one loop, and what makes a run resumable on one device or many.

`fit` is the loop that every script shares. It knows nothing of graphs and zoos, so anything with
parameters and a loss can be trained with it.
"""

from ngjax.train.checkpoint import Checkpoints, IfExists, prepare_folder
from ngjax.train.data import epoch_batches
from ngjax.train.loop import FitResult, fit
from ngjax.train.mesh import (
    DATA_AXIS,
    data_mesh,
    join_processes,
    local_rows,
    replicate,
    shard_batch,
    use_cpu_cores,
)
from ngjax.train.metrics import MetricsFile, read_metrics
from ngjax.train.progress import Progress
from ngjax.train.step import (
    LossFn,
    TrainState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    micro_batch_gradients,
    train_step,
)

__all__ = [
    "DATA_AXIS",
    "Checkpoints",
    "FitResult",
    "IfExists",
    "LossFn",
    "MetricsFile",
    "Progress",
    "TrainState",
    "data_mesh",
    "epoch_batches",
    "fit",
    "init_state",
    "join_processes",
    "learning_rate_schedule",
    "local_rows",
    "make_optimizer",
    "micro_batch_gradients",
    "prepare_folder",
    "read_metrics",
    "replicate",
    "shard_batch",
    "train_step",
    "use_cpu_cores",
]
