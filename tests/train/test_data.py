import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngjax import train


@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 5))
def test_every_pass_sees_every_example_once(num_examples, batch_size, seed):
    rows_at = train.epoch_batches(num_examples, batch_size, seed=seed)
    batches = [rows_at(step) for step in range(2 * num_examples)]
    assert all(batch.shape == (batch_size,) for batch in batches)
    stream = np.concatenate(batches)
    for begin in range(0, len(stream) - num_examples + 1, num_examples):
        one_pass = np.sort(stream[begin : begin + num_examples])
        np.testing.assert_array_equal(one_pass, np.arange(num_examples))


def test_is_a_function_of_the_step():
    forwards = [train.epoch_batches(50, 8, seed=3)(step) for step in range(20)]
    rows_at = train.epoch_batches(50, 8, seed=3)
    backwards = [rows_at(step) for step in reversed(range(20))]
    np.testing.assert_array_equal(forwards, backwards[::-1])


def test_passes_and_seeds_differ():
    first, second = (train.epoch_batches(50, 50, seed=3)(step) for step in range(2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, train.epoch_batches(50, 50, seed=4)(0))


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        train.epoch_batches(*sizes, seed=0)
