"""Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels that come inside the package."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from ngjax.zoo.images import IMAGE_SETS, Images


def load_digits() -> Images:
    """The 1,797 digits (Alpaydin and Kaynak, 1998), always in the same order; a pixel of 1 is ink.

    Raises:
      ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "load_digits needs scikit-learn, which holds the images: pip install 'ngjax[examples]'"
        ) from error
    bunch = datasets.load_digits()
    # Each pixel counts the ink in a block of 4 x 4 of the original scan.
    images = (bunch.images[..., None] / 16).astype(np.float32)
    return Images(images, bunch.target.astype(np.int32), IMAGE_SETS["digits"].class_names)


def stratified_split(
    labels: Int[np.ndarray, " N"], *, test_fraction: float, seed: int
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]:
    """Random rows for training and for testing, with the same share of every class in both.

    To split networks fitted to images, split the images: networks of one image then never end up on both sides.

    Args:
      labels: class of each row.
      test_fraction: share of each class that is held out, rounded to whole rows.
      seed: of the draw.

    Returns:
      The sorted rows for training, and those for testing.

    Raises:
      ValueError: a fraction that leaves one of the two sides of a class without a row.
    """
    rng = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held_out = round(test_fraction * len(rows))
        if not 0 < held_out < len(rows):
            raise ValueError(
                f"test_fraction={test_fraction} of the {len(rows)} rows of class {label} holds out {held_out}; "
                "expected at least one row on each side"
            )
        test.append(rows[:held_out])
        train.append(rows[held_out:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))
