"""Checks of the values of weights, where arrays are concrete."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngjax.graph import to_groups
from ngjax.spec import NeuralGraphSpec, flatten_with_path, format_path


def check_params(params: Any, *, spec: NeuralGraphSpec | None = None, source: str = "") -> None:
    """Raises where weights cannot be what was meant: for readers, scripts and the start of a run, not under `jit`.

    Args:
      params: a pytree of concrete arrays; leaves may have batch axes and a feature axis.
      spec: also check that the leaves are those of this architecture.
      source: where they come from (a file's name), for the message.

    Raises:
      ValueError: NaN or infinity, with the leaf's path, how many and where the first is; another architecture.
      TypeError: a complex leaf, one that is no array, or an abstract one.
    """
    prefix = f"{source}: " if source else ""
    for path, leaf in flatten_with_path(params)[0]:
        where = f"{prefix}parameter {format_path(path)}"
        if isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct)):
            raise TypeError(f"{where} has no values here; check_params reads concrete arrays, outside jit")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"{where}: expected an array, received {type(leaf).__name__}")
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(f"{where} is {leaf.dtype}; expected a real array")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        bad = ~np.isfinite(np.asarray(leaf).astype(np.float64))
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"{where} {tuple(leaf.shape)}: {int(bad.sum())} of {bad.size} values are NaN or infinite, the first at "
                f"{first}"
            )
    if spec is not None:
        try:
            jax.eval_shape(lambda p: to_groups(spec, p), params)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{prefix}{error}") from None
