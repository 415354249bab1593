"""Runs the one program over a mesh, and waits for it such that Ctrl-C is heard."""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped
from tqdm import tqdm

from sdjax import parallel
from sdjax.cache import enable_compilation_cache
from sdjax.errors import SdjaxError
from sdjax.model import Model
from sdjax.program import SampleConfig, SampleInputs, sample
from sdjax.progress import Listener, listening, report
from sdjax.typing import Params

POLL_SECONDS = 0.02


def run(
    model: Model,
    inputs: SampleInputs,
    config: SampleConfig,
    *,
    mesh: Mesh | None = None,
    show: bool = False,
) -> np.ndarray:
    """Compiles `sample` where it must, runs it over the mesh and waits for it.

    Args:
        model: whose parameters are used.
        inputs: from `sdjax.prepare`.
        config: from `sdjax.prepare`.
        mesh: with an axis "data", over which the images are split; None: local devices.
        show: a bar on standard error.

    Returns:
        What `sample` returns.

    Raises:
        SdjaxError: if the mesh has no axis "data", memory is short, or the caller is
            being traced.
    """
    enable_compilation_cache()
    batch = len(inputs.image_indices)
    mesh = _sized(parallel.make_mesh() if mesh is None else mesh, batch)
    inputs = _pad_batch(inputs, parallel.padded(batch, mesh) - batch)
    platform = mesh.devices.flat[0].platform
    reporting = show or platform == "cpu"
    total = int(np.max(inputs.tableau.step)) + 1
    with tqdm(total=total, disable=not show) as bar:

        def on_step(step: int) -> None:
            bar.update(step - bar.n)

        with _enough_memory(config, batch), listening(on_step) as listener:
            images = run_program(
                model.replicated(mesh),
                inputs,
                np.int32(listener.number),
                config=config,
                mesh=mesh,
                platform=platform if reporting else None,
            )
            _wait(images, listener, reporting)
    return np.asarray(images)[:batch]


@functools.partial(jax.jit, static_argnames=("config", "mesh", "platform"))
def run_program(
    params: Params,
    inputs: SampleInputs,
    number: Int[Array, ""],
    *,
    config: SampleConfig,
    mesh: Mesh,
    platform: str | None,
) -> Shaped[Array, "b height width c"]:
    """The one program: `sample` over a mesh.

    `number` is that of the listener; `platform` that of the mesh's devices, or None:
    then it makes no reports, and JAX's persistent cache takes it on any backend.
    """

    def program(params: Params, inputs: SampleInputs) -> Array:
        on_step = None
        if platform is not None:
            on_step = functools.partial(report, number, platform=platform)
        return sample(params, inputs, config=config, on_step=on_step)

    return parallel.data_parallel(program, mesh, _specs(inputs))(params, inputs)


@contextlib.contextmanager
def _enough_memory(config: SampleConfig, batch: int) -> Iterator[None]:
    """Says what was too large for the device."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise SdjaxError(
            f"{batch} images of {config.height} x {config.width} in {config.dtype} "
            "need more memory than there is: make fewer at once, or smaller ones"
        ) from error


def _wait(images: Any, listener: Listener, reporting: bool) -> None:
    """Waits for a result such that Ctrl-C is heard, and stops the loop on it."""
    if isinstance(images, Tracer):
        raise SdjaxError(
            "generate runs a program of its own and cannot stand inside jit, vmap or "
            "grad: use sdjax.prepare outside and sdjax.sample inside"
        )
    pause = POLL_SECONDS / 32
    try:
        while not images.is_ready():
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)
    except KeyboardInterrupt:
        listener.stop = True
        if reporting:
            images.block_until_ready()
        raise
    if listener.error is not None:
        raise listener.error
    # Raises what failed on the device; reading the array instead may end the process.
    images.block_until_ready()


def _sized(mesh: Mesh, batch: int) -> Mesh:
    """The mesh, or as much of a purely data-parallel one as the batch can fill."""
    if "data" not in mesh.shape:
        raise SdjaxError(
            f"mesh has the axes {mesh.axis_names}, but needs one named 'data': see "
            "sdjax.parallel.make_mesh"
        )
    if mesh.shape["data"] == mesh.size > batch:
        return parallel.make_mesh(list(mesh.devices.flat[:batch]))
    return mesh


def _specs(inputs: SampleInputs) -> Any:
    """How each input is split over the mesh: by image, where it has one per image."""
    whole = {"key": P(), "tableau": P(), "clip": P(), "noise": P(None, "data")}
    return SampleInputs(
        **{
            name: jax.tree.map(lambda _, name=name: whole.get(name, P("data")), value)
            for name, value in inputs._asdict().items()
        }
    )


def _pad_batch(inputs: SampleInputs, extra: int) -> SampleInputs:
    """Repeats the last image `extra` times."""
    if extra == 0:
        return inputs

    def pad(array, spec):
        if "data" not in spec:
            return array
        axis = list(spec).index("data")
        last = np.take(array, [-1] * extra, axis=axis)
        return np.concatenate([array, last], axis=axis)

    return jax.tree.map(pad, inputs, _specs(inputs))
