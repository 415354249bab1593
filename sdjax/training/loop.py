"""The loop: from a config and a folder to a trained model, killed or not.

What step n does depends on the config, the seed and the data alone; a checkpoint holds
the rest. So a run that was killed and started again ends with the same bytes.
"""

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax.data import Batch, Reader
from sdjax.errors import SdjaxError
from sdjax.sheet import save_sheet
from sdjax.training import autoencoder, diffusion, grid
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.config import TrainConfig
from sdjax.training.interruption import Interruption
from sdjax.training.logging import Board, LossLog, Meter, Progress
from sdjax.training.origin import Origin
from sdjax.training.state import TrainState
from sdjax.training.workdir import Workdir

TASKS = {"diffusion": diffusion, "autoencoder": autoencoder}


class _Pulled(NamedTuple):
    """A batch, and where the reader stands after it."""

    batch: Batch
    position: dict[str, Any]


@dataclasses.dataclass
class Loop:
    """A run between two steps.

    Attributes:
        step: calls of the step so far.
        position: of the reader after the last batch that was learned from.
        skipped: steps whose loss or gradient was not finite.
        frozen: digest of each component that does not learn.
    """

    config: TrainConfig
    origin: Origin
    workdir: Workdir
    checkpoints: Checkpoints
    reader: Reader
    mesh: Mesh
    state: TrainState
    frozen: dict[str, str]
    position: dict[str, Any]
    step: int = 0
    skipped: int = 0
    log_size: int = 0
    meter: Meter = dataclasses.field(default_factory=Meter)

    def run(self, interruption: Interruption, *, show: bool) -> None:
        """Goes on to the last step, or until it is asked to stop; saves the state."""
        config = self.config
        self._log = LossLog(self.workdir.losses, self.log_size)
        self._board = Board(self.workdir.tensorboard, self.step)
        self._progress = Progress(config.steps, self.step, show=show)
        self._saved_at = time.monotonic()
        pool = concurrent.futures.ThreadPoolExecutor(1, "batch")
        try:
            self._steps(pool, interruption)
            self._save()
            self.checkpoints.wait()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._progress.close()
            self._board.close()
            self._log.close()

    def _steps(
        self, pool: concurrent.futures.Executor, interruption: Interruption
    ) -> None:
        config = self.config
        train_step = compiled_step(config, self.mesh)
        key = jax.random.key(config.seed)
        rows = NamedSharding(self.mesh, PartitionSpec("data"))
        began = time.monotonic()
        pull = lambda: _Pulled(next(self.reader), self.reader.get_state())
        coming = pool.submit(pull) if self.step < config.steps else None
        first = True
        while coming is not None and interruption.signal is None:
            asked = time.monotonic()
            pulled = self._await(coming)
            waited = time.monotonic() - asked
            with _enough_memory(config):
                arrays = jax.device_put(pulled.batch.arrays, rows)
                self.state, metrics = train_step(self.state, arrays, key)
                more = self.step + 1 < config.steps
                coming = pool.submit(pull) if more else None
                metrics = {n: np.asarray(m) for n, m in jax.device_get(metrics).items()}
            now = time.monotonic()
            if not first:  # which compiles
                self.meter.add(now - began, waited, config.data.batch_size)
            first = False
            self._account(pulled, metrics)
            began = time.monotonic()

    def _await(self, coming: "concurrent.futures.Future[_Pulled]") -> _Pulled:
        """The next batch; where the data cannot be read, the state is saved first."""
        try:
            return coming.result()
        except SdjaxError:
            self._save()
            self.checkpoints.wait()
            raise
        except StopIteration:
            raise SdjaxError(f"{self.config.data.path} has no data left") from None

    def _account(self, pulled: _Pulled, metrics: dict[str, np.ndarray]) -> None:
        """What follows a step: the log, samples, a checkpoint."""
        config = self.config
        if not metrics["finite"] and config.on_nan == "stop":
            self._stop_at_nan(pulled, metrics)
        self.step += 1
        self.position = pulled.position
        if metrics["finite"]:
            self._log.write(self.step, metrics)
        else:
            self.skipped += 1
            self._log.write(self.step, metrics, keys=list(pulled.batch.keys))
            self._progress.say(
                f"step {self.step} left out: the loss is {metrics['loss']}; the batch "
                f"is {_listed(pulled.batch.keys)}"
            )
        self.log_size = self._log.size
        self._tell(metrics)
        samples = config.samples.every_steps
        if samples is not None and self.step % samples == 0:
            self._draw(pulled.batch)
        self.checkpoints.check()
        if self._is_due():
            self._save()

    def _tell(self, metrics: dict[str, np.ndarray]) -> None:
        config, loss = self.config, float(metrics["loss"])
        if self.step % config.log_every_steps and self.step != config.steps:
            self._progress.update(loss, None)
            return
        rate = self.meter.lap()
        self._progress.update(loss, rate)
        self._progress.line(self.step, loss, rate)
        share = {"images_per_second": rate, "waiting_share": self.meter.waiting_share}
        self._board.scalars(self.step, {**metrics, **share, "skipped": self.skipped})

    def _draw(self, batch: Batch) -> None:
        """Draws the samples with the averaged weights, where they are kept."""
        config = self.config
        if config.task == "autoencoder":
            if "image" not in batch.arrays:
                return
            vae = self.learned()["vae"]
            sheet = grid.draw_reconstructions(config, vae, batch.arrays["image"])
        elif config.samples.prompts:
            model = self.origin.model(self.learned(), str(self.workdir.path))
            sheet = grid.draw_prompts(config, model, self.mesh)
        else:
            return
        save_sheet(sheet, self.workdir.samples / f"{self.step:08}.png")
        self._board.picture(self.step, sheet)

    def learned(self) -> dict[str, Any]:
        """All parameters by component: the average, where it is kept, of those learned.

        The discriminator and LPIPS, which only serve the loss, are left out.
        """
        state = self.state
        learned = state.params if state.ema is None else state.ema
        everything = {**self.origin.params, **state.frozen, **learned}
        serving = ("discriminator", "lpips")
        return {name: t for name, t in everything.items() if name not in serving}

    def _is_due(self) -> bool:
        when = self.config.checkpoints
        if when.every_steps is not None and self.step % when.every_steps == 0:
            return True
        minutes = (time.monotonic() - self._saved_at) / 60
        return when.every_minutes is not None and minutes >= when.every_minutes

    def _save(self, step: int | None = None) -> None:
        """Saves the state, as that of `step` where it is not what the state says."""
        self._log.sync()
        step = self.step if step is None else step
        state = self.state._replace(step=np.int32(step))  # type: ignore[arg-type]
        run = {
            "position": self.position,
            "log_size": self.log_size,
            "skipped": self.skipped,
            "frozen": self.frozen,
            "key": np.asarray(
                jax.random.key_data(jax.random.key(self.config.seed))
            ).tolist(),
        }
        self.checkpoints.save(step, state._replace(frozen={}), run)
        self._saved_at = time.monotonic()

    def _stop_at_nan(self, pulled: _Pulled, metrics: dict[str, np.ndarray]) -> None:
        """Saves the state before the step, which left all but its number as it was."""
        self._save(self.step)
        self.checkpoints.wait()
        raise SdjaxError(
            f"the loss of step {self.step + 1} is {metrics['loss']}, the gradient's "
            f"norm {metrics['grad_norm']}; its batch is {_listed(pulled.batch.keys)}. "
            f"The state of step {self.step} is saved: go on with --set on_nan=skip to "
            "leave such batches out, or begin anew with a lower learning rate"
        )


def compiled_step(config: TrainConfig, mesh: Mesh) -> Any:
    """The task's step over a mesh: the state is donated, the batch split over "data".

    It is one program over the whole batch, so results do not depend on how it is
    split, but for the order in which devices add up.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return jax.jit(
        TASKS[config.task].make_train_step(config),
        in_shardings=(whole, rows, whole),
        out_shardings=whole,
        donate_argnums=0,
    )


@contextlib.contextmanager
def _enough_memory(config: TrainConfig) -> Iterator[None]:
    """Says what was too large for the device."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        data = config.data
        raise SdjaxError(
            f"a step on {data.batch_size} pictures of {data.resolution} x "
            f"{data.resolution} in {config.dtype} needs more memory than there is: "
            "raise optimizer.accumulation, set remat=true, or lower data.batch_size"
        ) from error


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - 20} more" if len(keys) > 20 else ""
    return ", ".join(keys[:20]) + more
