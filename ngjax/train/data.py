"""Which examples a step sees, as a function of the step alone."""

import functools
from collections.abc import Callable

import numpy as np


def epoch_batches(num_examples: int, batch_size: int, *, seed: int) -> Callable[[int], np.ndarray]:
    """Shuffled passes over a data set, cut into batches of equal size.

    Every pass is a fresh permutation drawn from `(seed, pass)`, and the passes follow each other
    without a gap: a batch at the end of one is filled up from the next. So shapes are static, no
    example is dropped, and the position in the data is the step and nothing else.

    Args:
      num_examples: size of the data set.
      batch_size: rows per step, over all processes together.
      seed: of the permutations.

    Returns:
      A function from the number of steps done to the `[batch_size]` int64 indices of the next one.

    Raises:
      ValueError: a size below one.

    Example:
      >>> rows_at = epoch_batches(10, 4, seed=0)
      >>> sorted(int(i) for step in range(5) for i in rows_at(step)) == sorted(2 * list(range(10)))
      True
    """
    if num_examples < 1 or batch_size < 1:
        raise ValueError(f"num_examples={num_examples} and batch_size={batch_size} must be at least 1")

    # Two: a batch may need the end of one pass and the start of the next.
    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(num_examples)

    def rows_at(step: int) -> np.ndarray:
        epochs, offsets = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_examples)
        parts = [permutation(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    return rows_at
