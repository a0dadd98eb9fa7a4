"""Meta-training of learned optimizers: the tasks that they are trained on."""

from ngjax.metatrain.tasks import (
    TASKS,
    Batch,
    Task,
    TaskData,
    draw_scales,
    epoch_rows,
    find_task,
    load_task_data,
    rescale,
    sample_batch,
    unscale,
)

__all__ = [
    "TASKS",
    "Batch",
    "Task",
    "TaskData",
    "draw_scales",
    "epoch_rows",
    "find_task",
    "load_task_data",
    "rescale",
    "sample_batch",
    "unscale",
]
