"""Model zoos: making, storing and reading networks, and the images they represent."""

from ngjax.zoo.digits import Digits, load_digits, stratified_split
from ngjax.zoo.siren import (
    SirenFits,
    SirenParams,
    apply_siren,
    fit_sirens,
    image_coordinates,
    init_siren,
    render,
)

__all__ = [
    "Digits",
    "SirenFits",
    "SirenParams",
    "apply_siren",
    "fit_sirens",
    "image_coordinates",
    "init_siren",
    "load_digits",
    "render",
    "stratified_split",
]
