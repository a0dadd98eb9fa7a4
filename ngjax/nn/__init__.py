"""Models on neural graphs: encoders, NG-GNN, NG-T and readouts, as Flax Linen modules."""

from ngjax.nn.encoder import EncoderConfig, WeightStatistics, weight_statistics
from ngjax.nn.gnn import NGGNN
from ngjax.nn.model_file import LoadedModel, load_model, save_model
from ngjax.nn.readout import GraphReadout, ParamsReadout, WeightSpaceModel
from ngjax.nn.transformer import NGT

__all__ = [
    "NGGNN",
    "NGT",
    "EncoderConfig",
    "GraphReadout",
    "LoadedModel",
    "ParamsReadout",
    "WeightSpaceModel",
    "WeightStatistics",
    "load_model",
    "save_model",
    "weight_statistics",
]
