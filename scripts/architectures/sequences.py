"""Architectures for sequences, sets and graphs, with small ones of other kinds."""

from __future__ import annotations

from .attention_networks import ATTENTION_NETWORKS
from .base import Architecture
from .gpt import GPTS
from .graphs_and_sets import GRAPHS_AND_SETS
from .recurrent import RECURRENT

SEQUENCES: tuple[Architecture, ...] = (*GPTS, *ATTENTION_NETWORKS, *RECURRENT, *GRAPHS_AND_SETS)
