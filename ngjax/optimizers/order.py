"""In which order a rule that runs over the layers of a network takes its parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ngjax.infer import BIAS_NAMES, name_parts, natural_order
from ngjax.optimizers.parts import check_leaves
from ngjax.spec import NeuralGraphSpec, Path


def natural_layer_order(paths: Sequence[Path], shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Indices of the leaves, layer by layer, weights before biases, as names and shapes tell it.

    Layers follow one another in natural order of their names (`Dense_2` before `Dense_10`; names with dots or slashes
    are taken apart). Within a layer, what has a number comes first in order of it (lists, `w1` and `b1`), then the leaf
    with more axes, then biases after others, then natural order of names.
    """

    def key(i: int) -> Any:
        *layer, name = map(str, name_parts(paths[i]) or [""])
        numbers = [int(number) for number in re.findall(r"\d+", name)]
        return natural_order(tuple(layer)), numbers, -len(shapes[i]), name in BIAS_NAMES, natural_order((name,))

    return sorted(range(len(paths)), key=key)


def spec_layer_order(spec: NeuralGraphSpec, paths: Sequence[Path], shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Indices of the leaves by depth in the spec's graph: edges into a level, its biases, at last loose scalars.

    Leaves of one depth are in the order of `natural_layer_order`.

    Raises:
      ValueError: a leaf is no parameter of the spec, or of another shape. The spec may have more parameters.
    """
    numbers = check_leaves(spec, paths, shapes)
    places: dict[int, tuple[int, int]] = {}
    for group in spec.edge_groups:
        if group.view is not None and not group.mirror:
            places.setdefault(group.view.param, (spec.node_group[group.target].level, 0))
    for nodes in spec.node_groups:
        if nodes.bias is not None:
            places.setdefault(nodes.bias.param, (nodes.level, 1))

    def place(i: int) -> tuple[int, int]:
        return places.get(numbers[i], (spec.max_level + 1, 0))

    # Stable, so that what is at one place keeps its natural order.
    return sorted(natural_layer_order(paths, shapes), key=place)
