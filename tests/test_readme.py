"""The README's Python runs as it stands."""

import pathlib
import re

import jax

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        exec("\n".join(blocks), {"__name__": "readme"})
    change, trained, *table, shape = capsys.readouterr().out.strip().split("\n")
    assert float(change) < 1e-5
    assert float(trained) < 1e-2
    assert table[0].startswith("neural graph: ")
    free = table[table.index(next(line for line in table if line.startswith("free permutation"))) + 2 :]
    assert len(free[: free.index("")]) == 5  # stream, heads, queries with keys and values of a head, hidden
    assert shape == "(4, 10)"
