"""The table of architectures, from narrow versions of two of them."""

import importlib.util
import json
import pathlib
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "trace_architectures.py"
NAMES = ("small CNN zoo", "SIREN 2-256x3-1")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("trace_architectures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))  # as when it is run
        patch.setitem(sys.modules, "trace_architectures", module)  # where dataclasses look up the annotations
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("architectures") / "new" / "folder"
    return script.main(script.Config(out=out, only=NAMES, narrow=True)), out


def test_numbers_are_those_of_the_networks(run):
    results, out = run
    assert json.loads((out / "results.json").read_text()) == results
    cnn, siren = results["rows"]
    assert (cnn["name"], siren["name"]) == NAMES
    assert cnn["parameters"] == (9 + 1) * 3 + (9 * 3 + 1) * 4 + (9 * 4 + 1) * 5 + (5 + 1) * 10
    assert siren["parameters"] == 3 * 6 + 7 * 5 + 6 * 3
    assert (cnn["permutations"], siren["permutations"]) == (3, 2)
    assert cnn["moved_neurons"] == cnn["hidden_neurons"] == 3 + 4 + 5
    assert siren["log10_symmetries"] == pytest.approx(4.9, abs=0.05)  # 6! * 5! = 86,400
    # Inputs, outputs and their biases; of three kernels both taps.
    assert siren["pinned_by"] == {"output": 2, "input": 1}
    assert cnn["pinned_by"] == {"conv_general_dilated": 6, "output": 2}
    for row in results["rows"]:
        assert row["error"] == ""
        assert row["loose"] == row["pinned_hidden_axes"] == 0
        assert 0 < row["deviation"] < 1e-4


def test_the_table_has_a_line_for_each(run):
    _, out = run
    assert {path.name for path in out.iterdir()} == {"results.json", "table.md"}
    lines = (out / "table.md").read_text().splitlines()
    for line, name in zip(lines[2:], NAMES, strict=False):
        assert line.startswith(f"| {name}")
        assert line.count("100%") == 2


def test_what_fails_is_a_row_too(script, tmp_path):
    def fail():
        raise ValueError("no such network\nand more")

    broken = script.ARCHITECTURES[0]._replace(narrow=fail)
    row = script.measure(broken, script.Config(out=tmp_path, narrow=True))
    assert row.error == "ValueError: no such network"
    assert "failed" in script.format_table([row]).splitlines()[2]


def test_unknown_names_are_told(script, tmp_path):
    with pytest.raises(SystemExit, match=r"unknown: AlexNet; there are ResNet-18"):
        script.main(script.Config(out=tmp_path, only=("AlexNet",)))
