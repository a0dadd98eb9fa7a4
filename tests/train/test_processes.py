import jax
import numpy as np

from ngjax import train
from tests.train import one_of_two, small_run
from tests.two_processes import run_two


def test_two_processes_end_as_one(tmp_path):
    """Each reads its half of every batch; both take part in saving, and one writes the metrics."""
    errors = run_two(one_of_two.__file__, tmp_path)
    assert ["step 10/10" in error for error in errors] == [True, False]

    alone = train.fit(**small_run.arguments(num_steps=10)).state.params
    for index in range(2):
        with np.load(tmp_path / f"final-{index}.npz") as final:
            for path, leaf in jax.tree.leaves_with_path(alone):
                np.testing.assert_allclose(final[jax.tree_util.keystr(path)], leaf, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(final["steps"], [3, 5, 6, 9, 10])
    rows = train.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 5, 6, 9, 10]
