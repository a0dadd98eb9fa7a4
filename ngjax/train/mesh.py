"""One program over all devices: parameters everywhere, the rows of a batch shared out.

Everything computes on every process; only process 0 writes metrics and progress, and checkpoints
are saved by all.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import PyTree

from ngjax.machine import available_cores

DATA_AXIS = "data"


def join_processes(enabled: bool) -> None:
    """Joins the other processes of a job on several hosts, if the script's switch says so.

    Call it before anything else uses JAX. The cluster is detected, or described by JAX's own
    environment variables; where neither works, call `jax.distributed.initialize` with the address.

    Args:
      enabled: the value of the switch; `False` does nothing.
    """
    if enabled and not jax.distributed.is_initialized():
        jax.distributed.initialize()


def use_cpu_cores(count: int | None = None) -> None:
    """Makes every core of the CPU a device of its own, among which `fit` then shares out each batch.

    One device computes with all cores as well, but hands them pieces of single operations, of which those on small
    networks are too small. Accelerators are not concerned. Call it before anything else uses JAX.

    Args:
      count: of devices; the cores this process may run on by default.
    """
    jax.config.update("jax_num_cpu_devices", available_cores() if count is None else count)


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis `"data"`, by default over all devices of all processes."""
    # Ordered by process and not by topology, so that each process holds consecutive rows. The axis
    # is Auto: with Explicit axes a sum over the batch would need an annotation in every loss.
    ordered = sorted(
        jax.devices() if devices is None else devices,
        key=lambda device: (device.process_index, device.id),
    )
    return Mesh(np.asarray(ordered), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """The same arrays on every device of the mesh.

    Args:
      tree: pytree of arrays and random keys, equal on all processes.
      mesh: over any number of processes.
    """
    sharding = NamedSharding(mesh, jax.P())

    def place(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            # JAX places arrays, but not keys, on devices of other processes.
            data = jax.device_put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.device_put(leaf, sharding)

    return jax.tree.map(place, tree)


def local_rows(num_rows: int) -> slice:
    """The rows of a global batch that this process reads: consecutive, equally many on each.

    Args:
      num_rows: rows of the batch over all processes together.

    Raises:
      ValueError: the processes cannot share the rows equally.
    """
    count = jax.process_count()
    if num_rows % count:
        raise ValueError(f"a batch of {num_rows} rows cannot be shared by {count} processes")
    rows = num_rows // count
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Places a batch on the mesh, its rows shared out over the devices.

    Args:
      batch: pytree of arrays `[rows, ...]`, of which this process holds its `local_rows`.
      mesh: made by `data_mesh`.

    Returns:
      The global batch, one array per leaf.

    Raises:
      ValueError: a leaf has no rows, or this process's devices cannot share them equally; the
        message names the leaf.
    """
    sharding = NamedSharding(mesh, jax.P(DATA_AXIS))
    num_devices = mesh.local_mesh.size

    def place(path: jax.tree_util.KeyPath, leaf: Any) -> jax.Array:
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] % num_devices:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}: expected [rows, ...]"
                f" with rows that {num_devices} devices can share equally"
            )
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map_with_path(place, batch)
