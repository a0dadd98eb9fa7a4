import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn

from ngjax.nn import (
    EncoderConfig,
    GraphReadout,
    ParamsReadout,
    WeightSpaceModel,
    WeightStatistics,
    load_model,
    save_model,
)
from tests.nn.small import ENCODER, gnn, ngt, siren_spec, variables_of

SPEC = siren_spec((2, 3, 4, 1))
STATISTICS = WeightStatistics((0.1, 0.2, 1 / 3), (0.5, 0.2, 0.1), (0.3, -0.1, 0.2), (0.4, 0.3, 0.7))
FULL = EncoderConfig(**{**vars(ENCODER), "statistics": STATISTICS, "fourier_frequencies": 2, "num_probes": 3})
MODELS = {
    "gnn": gnn(encoder=FULL, mean_log_degree=1.25, norm_scope="batch", dropout=0.1),
    "ngt": ngt(encoder=FULL, class_token=True, modulate_values=False),
    "gnn and graph readout": WeightSpaceModel(gnn(), GraphReadout(num_outputs=1, probe_outputs=False, pooling="mean")),
    "ngt and params readout": WeightSpaceModel(
        ngt(dtype=jnp.bfloat16), ParamsReadout(statistics=STATISTICS, output_scale=None, dtype=jnp.bfloat16)
    ),
}


@pytest.fixture
def saved(tmp_path):
    model = MODELS["gnn"]
    variables = variables_of(model, SPEC)
    path = tmp_path / "model.safetensors"
    save_model(path, model, variables, metadata={"data": "digits"})
    return path, model, variables


@pytest.mark.parametrize("name", MODELS)
def test_what_was_saved_is_loaded(name, tmp_path):
    model = MODELS[name]
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm relies on it for bfloat16
        variables = variables_of(model, SPEC)
    path = tmp_path / "model.safetensors"
    save_model(path, model, variables, metadata={"seed": "7"})
    loaded = load_model(path)
    assert loaded.model == model
    assert loaded.metadata == {"seed": "7"}
    assert ("constants" in loaded.variables) == ("constants" in variables)
    assert jax.tree.structure(loaded.variables) == jax.tree.structure(variables)
    for ours, theirs in zip(jax.tree.leaves(loaded.variables), jax.tree.leaves(variables), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_variables_of_any_float_are_kept(tmp_path):
    variables = {"params": {"a": jnp.arange(3, dtype=jnp.bfloat16), "b": {"c": jnp.ones((2, 0), jnp.float16)}}}
    save_model(tmp_path / "model", GraphReadout(), variables)
    loaded = load_model(tmp_path / "model").variables
    assert loaded["params"]["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded["params"]["a"], variables["params"]["a"])
    assert loaded["params"]["b"]["c"].shape == (2, 0)


def test_numpy_numbers_in_the_configuration_are_numbers(tmp_path):
    statistics = WeightStatistics(*((np.float32(0.5),),) * 4)
    model = gnn(encoder=EncoderConfig(statistics=statistics))
    save_model(tmp_path / "model", model, {})
    assert load_model(tmp_path / "model").model.encoder.statistics == statistics


def test_others_may_read_the_file(saved):
    path, _, _ = saved
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_value_that_is_not_finite_is_named(saved):
    path, model, variables = saved
    before = path.read_bytes()
    variables["params"]["layer_0"]["mix"]["bias"] = jnp.asarray([1.0, jnp.nan])
    with pytest.raises(ValueError, match=r"params/layer_0/mix/bias .*model\.safetensors was not written"):
        save_model(path, model, variables)
    assert path.read_bytes() == before


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_nothing_half_written_is_left(function, saved, monkeypatch):
    path, model, variables = saved
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(path, model, jax.tree.map(lambda x: x + 1, variables))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_to_is_named(saved, tmp_path):
    _, model, variables = saved
    with pytest.raises(OSError, match="nowhere"):
        save_model(tmp_path / "nowhere" / "model.safetensors", model, variables)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_model(tmp_path / "file" / "model.safetensors", model, variables)


def test_modules_of_others_are_not_saved(tmp_path):
    with pytest.raises(TypeError, match="NGGNN.*received Dense"):
        save_model(tmp_path / "model", nn.Dense(3), {})
    with pytest.raises(TypeError, match="received Dense"):
        save_model(tmp_path / "model", WeightSpaceModel(gnn(), nn.Dense(3)), {})
    assert not list(tmp_path.iterdir())


def test_missing_and_cut_files_are_named(saved, tmp_path):
    path, _, _ = saved
    with pytest.raises(FileNotFoundError, match=r"no file .*other\.safetensors"):
        load_model(tmp_path / "other.safetensors")
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
            load_model(path)
    with pytest.raises(ValueError, match="is a folder"):
        load_model(tmp_path)


def rewrite(path, **changes):
    """The same file with another header."""
    with safetensors.safe_open(path, framework="numpy") as file:
        header = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    header = {key: value for key, value in {**header, **changes}.items() if value is not None}
    path.write_bytes(safetensors.numpy.save(arrays, metadata=header))


def test_other_files_and_versions_are_named(saved):
    path, _, _ = saved
    rewrite(path, version="2")
    with pytest.raises(ValueError, match=r"model\.safetensors has format version 2; this library reads version 1"):
        load_model(path)
    rewrite(path, format=None)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a model of this library"):
        load_model(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class": "Dense", "features": 3}, r"model\.safetensors holds a module of class 'Dense'"),
        ({"class": "NGGNN", "colour": 3}, r"model\.safetensors: the configuration of NGGNN does not fit.*colour"),
        ({"class": "NGGNN", "dtype": {"dtype": "float7"}}, r"model\.safetensors.*float7"),
    ],
)
def test_foreign_configurations_are_named(config, message, saved):
    path, _, _ = saved
    rewrite(path, config=json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_model(path)
