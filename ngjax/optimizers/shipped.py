"""Meta-parameters that come with the package: a safetensors file and a card for each rule and form of step."""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any

from ngjax.optimizers.meta_file import load_meta_params

_FOLDER = importlib.resources.files("ngjax.optimizers") / "weights"
_SUFFIX = ".safetensors"


def shipped_names() -> tuple[str, ...]:
    """What there are meta-parameters of, as `ng-gnn-normalized`: the rule and the form of its step."""
    if not _FOLDER.is_dir():
        return ()
    return tuple(sorted(file.name.removesuffix(_SUFFIX) for file in _FOLDER.iterdir() if file.name.endswith(_SUFFIX)))


@functools.cache
def shipped_meta_params(rule: str, step: str) -> dict[str, Any]:
    """The meta-parameters of a rule.

    Raises:
      ValueError: there are none for this rule and step; names those that there are.
    """
    name = f"{rule}-{step}"
    if name not in shipped_names():
        raise ValueError(
            f"no weights are shipped for rule={rule!r} with step={step!r}; there are {', '.join(shipped_names())}; "
            "others need meta_params=, see init_meta_params"
        )
    with importlib.resources.as_file(_FOLDER / f"{name}{_SUFFIX}") as path:
        return load_meta_params(path).theta
