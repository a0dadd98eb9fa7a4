"""The rules by name: the sizes that the library meta-trains, and those of the paper."""

from __future__ import annotations

import typing
from typing import Any

from ngjax.baselines import NFN
from ngjax.nn import NGGNN, NGT, EncoderConfig
from ngjax.optimizers.features import NORMALIZED_FEATURES, SCALAR_FEATURES, FeatureSet
from ngjax.optimizers.graph_rules import GraphRule
from ngjax.optimizers.rules import CoordinatewiseLSTMRule, FFRule, LSTMRule

Rule = FFRule | LSTMRule | CoordinatewiseLSTMRule | GraphRule

KERNEL_RANGE = (1, 5, 5)


def ng_gnn_rule(width: int, num_layers: int, num_hidden: int, reads: FeatureSet = SCALAR_FEATURES) -> GraphRule:
    """A `GraphRule` on NG-GNN that reads networks of any size and depth."""
    encoder = EncoderConfig(positions="depth", kernel_range=KERNEL_RANGE)
    return GraphRule(NGGNN(width, num_layers, encoder), width, num_hidden, reads=reads)


def ng_t_rule(width: int, num_layers: int, num_hidden: int) -> GraphRule:
    """A `GraphRule` on NG-T that reads networks of any depth and some hundred neurons."""
    backbone = NGT(
        node_features=width,
        edge_features=width,
        attention_features=width,
        node_hidden=2 * width,
        edge_hidden=width,
        edge_mlp_hidden=2 * width,
        num_layers=num_layers,
        num_heads=4,
        encoder=EncoderConfig(reverse_edges=False, positions="depth", kernel_range=KERNEL_RANGE),
        last_edge_update="edges",
        class_token=True,
        attention_out=False,
        pair_means=True,
    )
    return GraphRule(backbone, width, num_hidden, readout_hidden=2, shared_readout=True)


def nfn_rule(width: int, num_layers: int, num_hidden: int) -> GraphRule:
    """A `GraphRule` on NFN that reads networks of any size and depth."""
    encoder = EncoderConfig(reverse_edges=False, positions="depth", kernel_range=KERNEL_RANGE)
    return GraphRule(NFN(width, num_layers, encoder), width, num_hidden)


def celo2_rule(width: int = 12) -> FFRule:
    """A small perceptron on what each scalar is relative to its tensor, after Celo2 (Moudgil et al., arXiv 2602.19142).

    With the normalized step and a schedule of the learning rate steps do not depend on the scale of the loss, as there;
    those of wide layers are smaller here.

    It is not that optimizer, and does not read its weights. The published one has 8 hidden units in each of two layers
    and 30 features, from momenta of three decays and, in a state of their own, an average of squared gradients and
    Adafactor's averages over rows and columns. Here the state has momenta alone, and more of them: ratios between
    momenta of different decays, and rows and columns of the momenta themselves, stand for what these averages tell; a
    history of squared gradients there is not. Of the others, the averages as features of their own and the clipped
    gradient, which depends on the scale of the loss, are left out. A step is normalized over the tensor, there over its
    last two axes; its magnitude is learned, there switched off; gradients are not clipped. What is learned is added to
    momentum, see `normalized_step`, which orthogonalizes matrices as Celo2 does, but kernels too, and does not leave
    biases and embeddings to AdamW.
    """
    return FFRule(width, num_hidden=2, reads=NORMALIZED_FEATURES)


RULES: dict[str, Rule] = {
    "ff": FFRule(),
    "lstm": LSTMRule(),
    "ng-gnn": ng_gnn_rule(16, num_layers=2, num_hidden=2, reads=NORMALIZED_FEATURES),
    "ng-t": ng_t_rule(16, num_layers=2, num_hidden=2),
    "nfn": nfn_rule(16, num_layers=2, num_hidden=2),
    "celo2": celo2_rule(),
    "coordinatewise-lstm": CoordinatewiseLSTMRule(),
}
"""The rules that the names stand for, with `step="normalized"`."""

PAPER_RULES: dict[str, Rule] = {
    "ff": FFRule(),
    "lstm": LSTMRule(),
    "ng-gnn": ng_gnn_rule(64, num_layers=8, num_hidden=8),
    "ng-t": ng_t_rule(32, num_layers=2, num_hidden=2),
    "nfn": nfn_rule(32, num_layers=3, num_hidden=2),
    "celo2": celo2_rule(),
    "coordinatewise-lstm": CoordinatewiseLSTMRule(),
}
"""The rules that the names stand for with `step="paper"`: those of Kofinas et al. (2024), in the sizes of its appendix,
with positions that carry over between networks; their perceptrons start otherwise, see `UpdateHead`.

`"nfn"`, about as large as theirs, `"celo2"` and `"coordinatewise-lstm"` are not among them.
"""

_BY_STEP = {"normalized": RULES, "paper": PAPER_RULES}


def find_rule(rule: str | Rule, step: str) -> Rule:
    """The rule of that name for a form of step, in `RULES` or `PAPER_RULES`; or the rule itself.

    Raises:
      ValueError: an unknown name or step, or no rule.
    """
    if step not in _BY_STEP:
        raise ValueError(f"unknown step {step!r}; known are {', '.join(_BY_STEP)}")
    if isinstance(rule, typing.get_args(Rule)):
        return rule  # type: ignore[return-value]
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known are {', '.join(RULES)}")
    return _BY_STEP[step][rule]


def computing(rule: Rule, dtype: Any, chunk: int | None) -> Rule:
    """The same rule computing in another dtype and in chunks; meta-parameters, features and results stay float32."""
    if isinstance(rule, GraphRule):
        rule = rule.clone(backbone=rule.backbone.clone(dtype=dtype))
    return rule.clone(dtype=dtype, chunk=chunk)
