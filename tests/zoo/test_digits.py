"""The digits and the split by image."""

import sys

import numpy as np
import pytest

from ngjax.zoo import load_digits, stratified_split


def test_images_and_labels():
    digits = load_digits()
    assert digits.images.shape == (1797, 8, 8, 1)
    assert digits.images.dtype == np.float32
    assert (digits.images.min(), digits.images.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(np.unique(digits.labels), np.arange(10))
    # A zero has a hole in its middle, a one has not.
    zero, one = (digits.images[digits.labels == label].mean(axis=0)[3:5, 3:5].mean() for label in (0, 1))
    assert zero < 0.3 < 0.7 < one


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"ngjax\[examples\]"):
        load_digits()


def test_split_covers_every_row_once_with_equal_shares():
    labels = load_digits().labels
    train, test = stratified_split(labels, test_fraction=0.2, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(len(labels)))
    for label in range(10):
        rows = np.count_nonzero(labels == label)
        assert np.count_nonzero(labels[test] == label) == round(0.2 * rows)


def test_split_depends_on_the_seed_alone():
    labels = np.repeat(np.arange(3), 20)
    first, again, other = (stratified_split(labels, test_fraction=0.25, seed=seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.99, 1.0, 1.5, -0.2])
def test_fractions_that_leave_a_side_empty_raise(fraction):
    with pytest.raises(ValueError, match="class 0"):
        stratified_split(np.repeat(np.arange(2), 20), test_fraction=fraction, seed=0)
