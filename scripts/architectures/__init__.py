"""Networks of many kinds, at their published sizes and narrow, with their symmetries written down by hand."""

from .base import Architecture, Network
from .sequences import SEQUENCES
from .vision import VISION

ARCHITECTURES: tuple[Architecture, ...] = (*VISION, *SEQUENCES)

__all__ = ["ARCHITECTURES", "Architecture", "Network"]
