import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from ngjax import train


def test_mesh_is_over_all_devices_with_an_auto_axis():
    mesh = train.data_mesh()
    assert mesh.axis_names == (train.DATA_AXIS,)
    assert mesh.axis_types == (AxisType.Auto,)
    assert mesh.devices.tolist() == jax.devices()


def test_rows_are_shared_out_and_parameters_are_everywhere():
    mesh = train.data_mesh()
    rows = np.arange(48.0).reshape(16, 3)
    placed = train.shard_batch({"x": rows}, mesh)["x"]
    np.testing.assert_array_equal(placed, rows)
    assert [shard.data.shape for shard in placed.addressable_shards] == 8 * [(2, 3)]
    everywhere = train.replicate(rows, mesh)
    assert [shard.data.shape for shard in everywhere.addressable_shards] == 8 * [(16, 3)]


@pytest.mark.parametrize("shape", [(12, 3), ()])
def test_rows_that_cannot_be_shared_are_named(shape):
    with pytest.raises(ValueError, match=r"batch\['x'\]\[0\] has shape .* 8 devices"):
        train.shard_batch({"x": [np.zeros(shape)]}, train.data_mesh())


def test_one_process_reads_all_rows():
    assert train.local_rows(7) == slice(0, 7)


def test_processes_are_joined_only_if_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda: calls.append("initialize"))
    train.join_processes(False)
    assert calls == []
    train.join_processes(True)
    assert calls == ["initialize"]
