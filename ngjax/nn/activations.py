"""Activation functions by the names specs use."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ngjax.spec import ACTIVATIONS
from ngjax.trig import sincos

SIREN_FREQUENCY = 30.0  # omega_0 of Sitzmann et al. (2020), and of every public INR zoo


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact GELU `x Phi(x)` by way of `erf`, which XLA computes several times faster on CPU than JAX's `erfc`."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _siren(x: Array) -> Array:
    return sincos(SIREN_FREQUENCY * x)[0]


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "relu": jax.nn.relu,
    "gelu": gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "leaky_relu": jax.nn.leaky_relu,
    "sine": lambda x: sincos(x)[0],
    "siren": _siren,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "softplus": jax.nn.softplus,
    "relu6": jax.nn.relu6,
    "hard_tanh": jax.nn.hard_tanh,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "mish": jax.nn.mish,
    "log_sigmoid": jax.nn.log_sigmoid,
}


def activation_function(name: str) -> Callable[[Array], Array]:
    """The elementwise function of a name in `ngjax.spec.ACTIVATIONS`.

    Raises:
      ValueError: the name stands for no elementwise function, so a network with it cannot be run on probe inputs.
    """
    if name not in _FUNCTIONS:
        raise ValueError(f"activation {name!r} is not an elementwise function; known are {', '.join(_FUNCTIONS)}")
    return _FUNCTIONS[name]


def apply_activations(x: Float[Array, "N P"], activation: Int[Array, " N"]) -> Float[Array, "N P"]:
    """Each row through the function its index into `ACTIVATIONS` stands for; NaN where it stands for none."""
    result = jnp.full_like(x, jnp.nan)
    for i, name in enumerate(ACTIVATIONS):
        if name in _FUNCTIONS:
            # The inner `where` keeps the derivative finite in rows that take another function.
            chosen = (activation == i)[:, None]
            result = jnp.where(chosen, _FUNCTIONS[name](jnp.where(chosen, x, 0.0)), result)
    return result
