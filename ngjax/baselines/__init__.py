"""What neural graphs are compared with."""

from ngjax.baselines.flat_mlp import FlatMLP, FlatStatistics, flat_statistics, flatten_params
from ngjax.baselines.nfn import NFN
from ngjax.baselines.probes import ProbeReadout

__all__ = [
    "NFN",
    "FlatMLP",
    "FlatStatistics",
    "ProbeReadout",
    "flat_statistics",
    "flatten_params",
]
