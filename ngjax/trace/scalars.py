"""Functions of one number, told by their values: which activation a chain of elementwise operations is.

An activation may be written in many ways (`jax.nn.gelu`, five multiplications and a `tanh`, a `where`). So the chain is
evaluated on a few numbers, and what comes out is compared with the activations of `ngjax.spec.ACTIVATIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

GRID = np.array([-7.3, -4.1, -2.9, -1.1, -0.31, 0.17, 0.83, 1.7, 3.6, 6.9])

_erf = np.vectorize(math.erf, otypes=[float])


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x)))


def _softplus(x: Any) -> Any:
    return np.logaddexp(x, 0.0)


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
_ACTIVATIONS: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("relu", lambda x: np.maximum(x, 0)),
    ("gelu", lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2),
    ("gelu", lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2),
    ("silu", lambda x: x * _sigmoid(x)),
    ("tanh", np.tanh),
    ("sigmoid", _sigmoid),
    ("sine", np.sin),
    ("siren", lambda x: np.sin(30 * x)),
    ("elu", lambda x: np.where(x > 0, x, np.expm1(x))),
    ("selu", lambda x: _SELU_SCALE * np.where(x > 0, x, _SELU_ALPHA * np.expm1(x))),
    ("softplus", _softplus),
    ("relu6", lambda x: np.clip(x, 0, 6)),
    ("hard_tanh", lambda x: np.clip(x, -1, 1)),
    ("hard_sigmoid", lambda x: np.clip(x + 3, 0, 6) / 6),
    ("hard_swish", lambda x: x * np.clip(x + 3, 0, 6) / 6),
    ("mish", lambda x: x * np.tanh(_softplus(x))),
    ("log_sigmoid", lambda x: -_softplus(-x)),
)
_VALUES = tuple((name, function(GRID)) for name, function in _ACTIVATIONS)


def name_of(values: np.ndarray) -> str:
    """The activation whose values on `GRID` these are: `"none"` for a straight line, `"other"` for an unknown one."""
    line = np.polyfit(GRID, values, 1)
    if np.allclose(np.polyval(line, GRID), values, rtol=1e-5, atol=1e-5):
        return "none"
    for name, expected in _VALUES:
        if np.allclose(values, expected, rtol=1e-3, atol=1e-3):
            return name
    positive = GRID > 0
    slopes = values / GRID
    if np.allclose(slopes[positive], 1) and np.allclose(slopes[~positive], slopes[0]):
        return "leaky_relu"
    return "other"


def is_exponential(values: np.ndarray) -> bool:
    """Whether the values are those of an exponential of any base and scale."""
    if np.any(values <= 0):
        return False
    logs = np.log(values)
    return bool(np.allclose(np.polyval(np.polyfit(GRID, logs, 1), GRID), logs, rtol=1e-5, atol=1e-5))


def _select(which: Any, *cases: Any) -> Any:
    return np.choose(np.asarray(which, int), cases)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.logical_and,
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "convert_element_type": lambda x: x,
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "cos": np.cos,
    "cosh": np.cosh,
    "div": np.divide,
    "eq": np.equal,
    "erf": _erf,
    "erfc": lambda x: 1 - _erf(x),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": _sigmoid,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.logical_not,
    "one_minus_square": lambda x: 1 - np.square(x),
    "or": np.logical_or,
    "pow": np.power,
    "reduce_precision": lambda x: x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select_n": _select,
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": lambda x: x,
    "sub": np.subtract,
    "tan": np.tan,
    "tanh": np.tanh,
}


def evaluate(eqn: Any, operands: Sequence[Any]) -> np.ndarray | None:
    """An elementwise equation on numbers, `None` where it is not known or an operand is not."""
    if any(x is None for x in operands):
        return None
    name = eqn.primitive.name
    with np.errstate(all="ignore"):
        if name == "integer_pow":
            return np.asarray(operands[0], float) ** eqn.params["y"]
        function = _FUNCTIONS.get(name)
        return None if function is None else np.asarray(function(*operands))
