import jax
import numpy as np
import pytest
import safetensors.numpy

from ngjax.optimizers import FFRule, init_meta_params, ng_learned_opt
from ngjax.optimizers.meta_file import MetaFile, load_meta_params, save_meta_params


def test_meta_parameters_come_back_with_what_is_known_of_them(tmp_path):
    theta = init_meta_params(jax.random.key(0), "ff")
    save_meta_params(tmp_path / "a.safetensors", theta, {"rule": "ff", "config": {"runs": 3}})
    loaded = load_meta_params(tmp_path / "a.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded.theta, theta)
    assert loaded.metadata == {"rule": "ff", "config": {"runs": 3}}


def test_meta_parameters_that_are_not_finite_are_refused(tmp_path):
    theta = {"head": {"bias": np.array([1.0, np.nan], np.float32)}}
    with pytest.raises(ValueError, match="meta-parameter head/bias has values that are not finite"):
        save_meta_params(tmp_path / "a.safetensors", theta, {})
    assert not list(tmp_path.iterdir())


def test_files_that_are_something_else_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_meta_params(path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_meta_params(path)
    path.write_bytes(safetensors.numpy.save({"x": np.zeros(2)}))
    with pytest.raises(ValueError, match="has format None, version None; expected 'ngjax.meta_params', version 1"):
        load_meta_params(path)


def test_what_was_read_is_an_optimizer_of_its_rule_and_step():
    theta = init_meta_params(jax.random.key(0), "ff")
    params, gradients = {"w": np.ones((2, 3), np.float32)}, {"w": np.ones((2, 3), np.float32)}

    def update(meta_params):
        optimizer = ng_learned_opt("ff", meta_params=meta_params)
        return optimizer.update(gradients, optimizer.init(params), params)[0]["w"]

    file = MetaFile(theta, {"rule": "ff", "step": "normalized"})
    np.testing.assert_array_equal(update(file), update(theta))
    np.testing.assert_array_equal(update(MetaFile(theta, {})), update(theta))  # says nothing of them
    ng_learned_opt(FFRule(), meta_params=file)  # has no name


def test_meta_parameters_of_another_rule_or_step_are_refused():
    """Shapes of `ff` are the same for both steps."""
    theta = init_meta_params(jax.random.key(0), "ff")
    with pytest.raises(
        ValueError, match="meta_params: expected meta-parameters of step='normalized', the file has those of 'paper'"
    ):
        ng_learned_opt("ff", meta_params=MetaFile(theta, {"rule": "ff", "step": "paper"}))
    with pytest.raises(
        ValueError, match="meta_params: expected meta-parameters of rule='ff', the file has those of 'lstm'"
    ):
        ng_learned_opt("ff", meta_params=MetaFile(theta, {"rule": "lstm", "step": "normalized"}))
