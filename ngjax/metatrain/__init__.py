"""Meta-training of learned optimizers: tasks, runs on them, and estimates of what meta-parameters should become."""

from ngjax.metatrain.estimators import PES, Estimate, Estimator, OneStep, PaperScheme
from ngjax.metatrain.loop import MetaResult, meta_train, paper_optimizer
from ngjax.metatrain.optimizers import LearnedOptimizer, adam
from ngjax.metatrain.tasks import (
    TASKS,
    Batch,
    Task,
    TaskData,
    draw_scales,
    find_task,
    load_task_data,
    rescale,
    sample_batch,
    unscale,
)
from ngjax.metatrain.unroll import OptimizerMaker, Run, RunSettings, Trainer
from ngjax.optimizers.meta_file import MetaFile, load_meta_params, save_meta_params

__all__ = [
    "PES",
    "TASKS",
    "Batch",
    "Estimate",
    "Estimator",
    "LearnedOptimizer",
    "MetaFile",
    "MetaResult",
    "OneStep",
    "OptimizerMaker",
    "PaperScheme",
    "Run",
    "RunSettings",
    "Task",
    "TaskData",
    "Trainer",
    "adam",
    "draw_scales",
    "find_task",
    "load_meta_params",
    "load_task_data",
    "meta_train",
    "paper_optimizer",
    "rescale",
    "sample_batch",
    "save_meta_params",
    "unscale",
]
