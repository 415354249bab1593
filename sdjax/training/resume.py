"""Where a run goes on: before its first step, or after its last whole checkpoint."""

import warnings

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax import parallel
from sdjax.data import Reader
from sdjax.errors import SdjaxError
from sdjax.training.checkpoint import Checkpoints, Restored, refill
from sdjax.training.config import TrainConfig
from sdjax.training.loop import TASKS, Loop
from sdjax.training.origin import Origin, digest
from sdjax.training.state import TrainState
from sdjax.training.workdir import Workdir


def begin(
    origin: Origin, workdir: Workdir, checkpoints: Checkpoints, reader: Reader
) -> Loop:
    """A run before its next step: the first, or that after its last checkpoint.

    Raises:
        SdjaxError: if the checkpoint is of another run, or of other frozen components.
    """
    config = origin.config
    mesh = batch_mesh(config)
    whole = NamedSharding(mesh, PartitionSpec())
    state = TASKS[config.task].init_state(config, origin.params)
    frozen = {name: digest(tree) for name, tree in sorted(state.frozen.items())}
    restored = checkpoints.restore()
    if restored is None:
        state = jax.device_put(state, whole)
        position = reader.get_state()
        return Loop(
            *(config, origin, workdir, checkpoints, reader, mesh, state, frozen),
            position=position,
        )
    _compare_frozen(restored.run["frozen"], frozen, config)
    state = _restored_state(state, restored, str(checkpoints.folder))
    reader.set_state(restored.run["position"])
    return Loop(
        *(config, origin, workdir, checkpoints, reader, mesh),
        state=jax.device_put(state, whole),
        frozen=frozen,
        position=restored.run["position"],
        step=restored.step,
        skipped=restored.run["skipped"],
        log_size=restored.run["log_size"],
    )


def batch_mesh(config: TrainConfig) -> Mesh:
    """The local devices, or as many as divide the rows worked on at a time."""
    devices = jax.local_devices()
    rows = config.data.batch_size // config.optimizer.accumulation
    used = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    if used < len(devices):
        warnings.warn(
            f"{used} of {len(devices)} devices are used: {rows} pictures at a time do "
            "not divide over all of them (data.batch_size, optimizer.accumulation)",
            stacklevel=2,
        )
    return parallel.make_mesh(devices[:used])


def _restored_state(state: TrainState, restored: Restored, where: str) -> TrainState:
    """The state of a checkpoint, on the host; frozen parts are those of `state`."""
    learning = state._replace(frozen={})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), learning)
    for leaf in jax.tree.leaves(learning):
        leaf.delete()  # makes room for what replaces it
    where = f"{where}, step {restored.step}"
    return refill(shapes, restored.arrays, where)._replace(frozen=state.frozen)


def _compare_frozen(
    before: dict[str, str], now: dict[str, str], config: TrainConfig
) -> None:
    names = before.keys() | now.keys()
    changed = sorted(name for name in names if before.get(name) != now.get(name))
    if changed:
        sources = (config.init_from, config.autoencoder_from, config.text_encoder_from)
        named = ", ".join(dict.fromkeys(source for source in sources if source))
        raise SdjaxError(
            f"{' and '.join(changed)} of {named or 'this run'} changed since the run "
            "began: put back the model that it began with, or begin in another folder"
        )
