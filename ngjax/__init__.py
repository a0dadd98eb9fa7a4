"""Neural graphs in JAX: the weights of a network as a graph, and models that read and edit them."""

from ngjax.batching import GraphBudget, batch_graphs, budget_for, unbatch_graphs
from ngjax.chains import cnn_spec, mlp_spec
from ngjax.check import check_params
from ngjax.graph import GroupedGraph, to_graph, to_groups, to_params
from ngjax.infer import infer_spec
from ngjax.matching import match_params, sort_params
from ngjax.nn import (
    NGGNN,
    NGT,
    EncoderConfig,
    GraphReadout,
    ParamsReadout,
    WeightSpaceModel,
    WeightStatistics,
    load_model,
    save_model,
    weight_statistics,
)
from ngjax.optimizers import init_meta_params, ng_learned_opt
from ngjax.plots import plot_spec
from ngjax.spec import NeuralGraphSpec
from ngjax.symmetry import permute_params, permute_randomly, random_permutations
from ngjax.trace import trace_spec
from ngjax.verify import SymmetryReport, check_symmetry
from ngjax.version import __version__

__all__ = [
    "NGGNN",
    "NGT",
    "EncoderConfig",
    "GraphBudget",
    "GraphReadout",
    "GroupedGraph",
    "NeuralGraphSpec",
    "ParamsReadout",
    "SymmetryReport",
    "WeightSpaceModel",
    "WeightStatistics",
    "__version__",
    "batch_graphs",
    "budget_for",
    "check_params",
    "check_symmetry",
    "cnn_spec",
    "infer_spec",
    "init_meta_params",
    "load_model",
    "match_params",
    "mlp_spec",
    "ng_learned_opt",
    "permute_params",
    "permute_randomly",
    "plot_spec",
    "random_permutations",
    "save_model",
    "sort_params",
    "to_graph",
    "to_groups",
    "to_params",
    "trace_spec",
    "unbatch_graphs",
    "weight_statistics",
]
