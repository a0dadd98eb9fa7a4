"""The script end to end, with a small network and few steps."""

import importlib.util
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
from matplotlib import image

from ngjax import train
from ngjax.optimizers import FFRule, init_meta_params, ng_learned_opt
from ngjax.optimizers.meta_file import load_meta_params

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "meta_train.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("meta_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["meta_train"] = module  # where dataclasses look up the annotations
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "find_rule", lambda rule, step: FFRule(4, 1))
        yield module
    del sys.modules["meta_train"]


def config(script, out, **changes):
    small = {
        "tasks": ("digits-mlp-4-relu",),
        "outer_steps": 3,
        "runs": 8,
        "truncation": 2,
        "horizons": (2, 4),
        "test_steps": 3,
        "test_seeds": 2,
    }
    return script.Config(out=out, **{**small, **changes})


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("meta_train") / "new" / "folder"
    return script.main(config(script, out)), out


def test_results_are_complete(run):
    results, out = run
    assert json.loads((out / "results.json").read_text()) == results
    assert {path.name for path in out.iterdir()} == {
        "card.md",
        "checkpoints",
        "curves.png",
        "meta_params.safetensors",
        "metrics.jsonl",
        "results.json",
        "settings.json",
    }
    assert image.imread(out / "curves.png").shape[2] == 4
    assert len(train.read_metrics(out / "metrics.jsonl")) == 3
    assert results["tests"].keys() == {"digits-mlp-4-relu"}
    assert results["tests"]["digits-mlp-4-relu"].keys() == {"ff", "adam"}
    for numbers in results["tests"]["digits-mlp-4-relu"].values():
        assert numbers["test_loss"] == numbers["test_losses"][numbers["peak_rates"].index(numbers["peak_rate"])]
        assert 0 <= numbers["test_accuracy"] <= 1
        assert numbers["peak_rate"] in numbers["peak_rates"]
    assert len(results["table"]) == 4
    card = (out / "card.md").read_text()
    assert card.startswith("# Meta-parameters of ff, normalized steps")
    assert all(line in card for line in results["table"])
    assert {"machine", "versions", "date", "command", "seconds", "config"} <= results.keys()


def test_the_meta_parameters_make_an_optimizer_and_say_where_they_come_from(run):
    _, out = run
    theta, metadata = load_meta_params(out / "meta_params.safetensors")
    assert (metadata["rule"], metadata["step"], metadata["seed"]) == ("ff", "normalized", 0)
    assert {"config", "date", "command", "versions"} <= metadata.keys()
    ng_learned_opt(FFRule(4, 1), meta_params=theta, step=metadata["step"], learning_rate=0.01)
    fresh = init_meta_params(jax.random.split(jax.random.key(0), 3)[0], FFRule(4, 1))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), theta, fresh)
    assert all(0 < size < 0.1 for size in jax.tree.leaves(moved))


def test_the_same_command_again_changes_nothing_and_needs_no_data(script, run, monkeypatch):
    _, out = run
    monkeypatch.setattr(script, "load_task_data", no_data)
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for changes in ({}, {"test_steps": 0}):
        results = script.main(config(script, out, **changes))
        assert results == json.loads(before[out / "results.json"])
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("changes", [{"test_steps": 4}, {"test_seeds": 1}])
def test_other_tests_of_a_finished_run_are_made(script, run, tmp_path, changes):
    shutil.copytree(run[1], tmp_path / "again")
    results = script.main(config(script, tmp_path / "again", **changes))
    assert {name: results["config"][name] for name in changes} == changes


def test_meta_parameters_may_come_from_another_run(script, run, tmp_path):
    file = run[1] / "meta_params.safetensors"
    no_change = {"test_steps": 0, "learning_rate": 0.0, "start_from": file}
    results = script.main(config(script, tmp_path / "ff", **no_change))
    assert results["started_from"] == load_meta_params(file).metadata
    theta = load_meta_params(tmp_path / "ff" / "meta_params.safetensors").theta
    jax.tree.map(np.testing.assert_array_equal, theta, load_meta_params(file).theta)
    with pytest.raises(
        ValueError, match=r"meta_params.safetensors: expected meta-parameters of step='paper', .* those of 'normalized'"
    ):
        script.main(config(script, tmp_path / "paper", scheme="paper", **no_change))


def test_other_settings_do_not_go_on_with_a_run(script, run):
    with pytest.raises(ValueError, match=r"holds a run with seed=0, received 5"):
        script.main(config(script, run[1], seed=5))


def test_a_finished_run_can_be_lengthened(script, tmp_path):
    def run(outer_steps):
        results = script.main(config(script, tmp_path, test_steps=0, scheme="paper", outer_steps=outer_steps))
        theta = load_meta_params(tmp_path / "meta_params.safetensors").theta
        return results["lengthened"], train.read_metrics(tmp_path / "metrics.jsonl"), theta

    short, long, longer = (run(outer_steps) for outer_steps in (3, 5, 6))
    assert [result[0] for result in (short, long, longer)] == [[], [3], [3, 5]]
    assert [len(result[1]) for result in (short, long, longer)] == [3, 5, 6]
    assert longer[1][:5] == long[1]
    assert long[1][:3] == short[1]
    # The schedule of three steps was at zero: another one moves meta-parameters on, by no more than its learning rate.
    moved = [np.max(np.abs(a - b)) for a, b in zip(*map(jax.tree.leaves, (short[2], long[2])), strict=True)]
    assert 1e-5 < max(moved) < 2 * 3e-4
    assert "its schedule ended after 3, then 5 outer steps" in (tmp_path / "card.md").read_text()
    # Taken up again it is the lengthened run, and no longer the short one.
    assert run(6)[0] == [3, 5]
    with pytest.raises(ValueError, match="holds a run with outer_steps=6, received 5"):
        run(5)


def no_data(name, **_):
    raise OSError(f"no such data: {name}")


def test_a_run_is_not_lengthened_by_settings_that_cannot_be(script, tmp_path, monkeypatch):
    script.main(config(script, tmp_path, test_steps=0))
    with pytest.raises(FileNotFoundError):
        script.main(config(script, tmp_path, test_steps=0, outer_steps=5, start_from=tmp_path / "none"))
    with monkeypatch.context() as patch:
        patch.setattr(script, "load_task_data", no_data)
        with pytest.raises(OSError, match="no such data"):
            script.main(config(script, tmp_path, test_steps=0, outer_steps=5))
    assert script.main(config(script, tmp_path, test_steps=0))["lengthened"] == []


def test_an_unfinished_run_is_not_lengthened(script, tmp_path):
    script.main(config(script, tmp_path, test_steps=0))
    (tmp_path / "results.json").unlink()
    with pytest.raises(ValueError, match="holds a run that is not finished: give its outer_steps=3 first"):
        script.main(config(script, tmp_path, test_steps=0, outer_steps=5))


@pytest.mark.parametrize(
    ("changes", "step"),
    [({"scheme": "paper"}, "paper"), ({"estimator": "pes"}, "normalized"), ({"step": "paper"}, "paper")],
    ids=["paper scheme", "pes", "paper step"],
)
def test_other_schemes_estimators_and_steps(script, tmp_path, changes, step):
    results = script.main(config(script, tmp_path, test_steps=0, **changes))
    assert results["table"] == []
    assert results["step"] == load_meta_params(tmp_path / "meta_params.safetensors").metadata["step"] == step
    assert np.isfinite(results["meta_loss"]["digits-mlp-4-relu"])


def test_defaults_are_those_of_the_scheme(script, tmp_path):
    paper = script.with_defaults(script.Config(tmp_path, ("digits-mlp-4-relu",), scheme="paper"))
    assert (paper.outer_steps, paper.runs, paper.truncation, paper.learning_rate) == (1000, 1, 100, 3e-4)
    assert script.with_defaults(script.Config(tmp_path, ("digits-mlp-4-relu",), runs=3)).runs == 3
    assert script.make_estimator(paper).inner_steps == 100


@pytest.mark.parametrize("scheme", ["fresh", "paper"])
def test_the_outer_learning_rate_is_the_one_given(script, tmp_path, scheme):
    settings = script.Config(tmp_path, (), scheme=scheme, learning_rate=0.125, warmup_steps=0)
    optimizer = script.make_outer_optimizer(script.with_defaults(settings))
    theta = {"a": np.ones(1, np.float32)}
    with jax.numpy_dtype_promotion("standard"):  # schedules of optax mix dtypes
        updates, _ = optimizer.update({"a": np.full(1, 0.5, np.float32)}, optimizer.init(theta), theta)
    np.testing.assert_allclose(updates["a"], -0.125, rtol=1e-5)  # the first step of Adam is as long as its rate


def test_settings_that_cannot_be_are_refused(script, tmp_path):
    with pytest.raises(ValueError, match="scheme=paper has its own estimator"):
        script.main(config(script, tmp_path / "a", scheme="paper", estimator="pes"))
    with pytest.raises(ValueError, match="expected step=paper, received step=normalized"):
        script.main(config(script, tmp_path / "a", scheme="paper", step="normalized"))
    with pytest.raises(ValueError, match="unknown task 'nothing'"):
        script.main(config(script, tmp_path / "a", tasks=("nothing",)))
    assert not (tmp_path / "a").exists()
