"""One program over many devices: the mesh, and data-parallel sampling on it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax.errors import SdjaxError

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    devices: Sequence[Any] | None = None, *, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """Lays devices out as ("data", "fsdp", "tensor").

    Args:
        devices: jax.Device, each; every local one by default.
        fsdp: size of the axis over which parameters are split.
        tensor: size of the axis over which layers are split.

    Raises:
        SdjaxError: if the devices do not fill the axes.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    if len(devices) % (fsdp * tensor):
        raise SdjaxError(
            f"{len(devices)} devices cannot be laid out with fsdp={fsdp} and "
            f"tensor={tensor}: their product must divide the number of devices"
        )
    return Mesh(np.reshape(np.array(devices), (-1, fsdp, tensor)), AXES)


def data_parallel(function: Callable[..., Any], mesh: Mesh, specs: Any) -> Callable:
    """Runs `function(params, inputs)` on each device's share of the batch.

    Args:
        function: rows of its result depend on the same rows of its inputs alone.
        mesh: samples are split over "data"; parameters are replicated.
        specs: a PartitionSpec for each leaf of inputs.
    """
    if mesh.size == 1:
        return function
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), specs),
        out_specs=PartitionSpec("data"),
        check_vma=False,  # the loop's own control flow is the same on each device
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies arrays to every device of `mesh`; a single device gets them uncopied."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def padded(batch: int, mesh: Mesh) -> int:
    """The next batch size that fills the "data" axis evenly."""
    shards = mesh.shape["data"]
    return -(-batch // shards) * shards
