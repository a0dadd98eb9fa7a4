import jax
import numpy as np
import pytest
import safetensors.numpy

from ngjax.optimizers import init_meta_params
from ngjax.optimizers.meta_file import load_meta_params, save_meta_params


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
