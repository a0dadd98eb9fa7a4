"""Model zoos: making, storing and reading networks, and the images they represent."""

from ngjax.zoo.augment import AUGMENTATIONS, AugmentConfig, augment
from ngjax.zoo.digits import load_digits, stratified_split
from ngjax.zoo.images import IMAGE_SETS, Images, ImageSet, load_images
from ngjax.zoo.published import PUBLISHED_ZOOS, Conversion, convert_published
from ngjax.zoo.recipes import RECIPES, SirenRecipe, fit_images
from ngjax.zoo.siren import (
    InitRule,
    SirenFits,
    SirenParams,
    apply_siren,
    fit_sirens,
    image_coordinates,
    init_siren,
    render,
)
from ngjax.zoo.store import Entry, Zoo, ZooWriter, open

__all__ = [
    "AUGMENTATIONS",
    "IMAGE_SETS",
    "PUBLISHED_ZOOS",
    "RECIPES",
    "AugmentConfig",
    "Conversion",
    "Entry",
    "ImageSet",
    "Images",
    "InitRule",
    "SirenFits",
    "SirenParams",
    "SirenRecipe",
    "Zoo",
    "ZooWriter",
    "apply_siren",
    "augment",
    "convert_published",
    "fit_images",
    "fit_sirens",
    "image_coordinates",
    "init_siren",
    "load_digits",
    "load_images",
    "open",
    "render",
    "stratified_split",
]
