"""What a row of the table of architectures is made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Network(NamedTuple):
    """A network at one size: its function in evaluation mode, its initialiser and example inputs."""

    apply: Callable[..., Any]  # apply(params, *inputs) -> outputs
    init: Callable[[jax.Array], Any]  # key -> params, arrays only; abstract ones come from jax.eval_shape(init, key)
    inputs: tuple[Any, ...]  # a small batch


class Architecture(NamedTuple):
    """An architecture at its published size and as a narrow one, whose symmetries are written down by hand.

    `free` and what follows belong to the narrow version. Nothing here is read from a trace but the last two, which say
    what the trace does not find.
    """

    name: str
    framework: str  # "Flax Linen", "Flax NNX", "Haiku", "Equinox" or "plain JAX"
    full: Callable[[], Network]
    narrow: Callable[[], Network]
    free: tuple[tuple[int, int], ...]  # free permutations, sorted: size, number of places that have one of their own
    pinned: tuple[tuple[str, int, str], ...]  # parameter's path, axis, reason: telling axes that keep their order
    loose: int = 0  # scalars without a home in nodes or edges
    missed: tuple[tuple[int, int], ...] = ()  # of `free`, what the trace pins, or ties to others, needlessly
    tied: tuple[tuple[int, int], ...] = ()  # what it finds instead


def normal(*shape: int) -> np.ndarray:
    """Inputs: the same numbers in every run."""
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def linen(model: Any, *inputs: Any) -> Network:
    """A Linen module as a network, all its variables as parameters."""
    return Network(model.apply, functools.partial(_init, model, inputs), inputs)


def _init(model: Any, inputs: tuple[Any, ...], key: jax.Array) -> Any:
    return model.init(key, *inputs)


def chain(*sizes: int) -> tuple[tuple[int, int], ...]:
    """Free permutations that are one of a kind each."""
    return tuple((size, 1) for size in sizes)
