"""A run without networks: the loop's own tests train a line through points."""

import contextlib
import dataclasses
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdjax.data import Batch
from sdjax.training import loop
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.config import CheckpointConfig, DataConfig, TrainConfig
from sdjax.training.interruption import heard
from sdjax.training.origin import Origin
from sdjax.training.resume import begin
from sdjax.training.state import apply_gradients, make_state
from sdjax.training.workdir import Workdir

CONFIG = TrainConfig(
    data=DataConfig(path="points", batch_size=8),
    checkpoints=CheckpointConfig(every_steps=4, every_minutes=None, keep=2),
    steps=12,
    log_every_steps=5,
)


class Points:
    """A reader: batch n is drawn from n; those in `bad` hold a NaN."""

    skipped: dict[str, list[str]]

    def __init__(self, size: int = 8, bad: tuple[int, ...] = (), last: int = 10**9):
        self.at, self.size, self.bad, self.last, self.skipped = 0, size, bad, last, {}

    def __next__(self) -> Batch:
        if self.at == self.last:
            raise StopIteration
        x = np.random.default_rng(self.at).standard_normal((self.size, 3), np.float32)
        if self.at in self.bad:
            x[0, 0] = np.nan
        keys = [f"point {self.at}.{i}" for i in range(self.size)]
        self.at += 1
        return Batch({"x": x}, keys)

    def get_state(self) -> dict[str, int]:
        return {"at": self.at}

    def set_state(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def init_state(config, params):
    learning = {"line": params["line"]}
    frozen = {"slope": params["slope"]}
    return make_state(learning, frozen, optax.adam(0.1), keep_ema=True)


def make_train_step(config):
    def train_step(state, batch, key):
        noise = jax.random.normal(jax.random.fold_in(key, state.step), (8,))
        y = batch["x"] @ state.frozen["slope"] + 0.1 * noise

        def loss_of(params):
            return jnp.mean(jnp.square(batch["x"] @ params["line"] - y))

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        finite = jnp.isfinite(loss).astype(jnp.float32)
        state = apply_gradients(
            state, gradients, optax.adam(0.1), finite=finite, ema_decay=0.99
        )
        norm = optax.tree.norm(gradients)
        return state, {"loss": loss, "grad_norm": norm, "finite": finite}

    return train_step


def use_toy(monkeypatch) -> None:
    toy = types.SimpleNamespace(init_state=init_state, make_train_step=make_train_step)
    monkeypatch.setitem(loop.TASKS, "diffusion", toy)


def run(folder: Path, reader: Points | None = None, before=None, **changes):
    """Trains in `folder` until something ends it; returns the loop.

    `before` is called with the loop before its first step.
    """
    config = dataclasses.replace(CONFIG, **changes)
    params = {"line": jnp.zeros(3), "slope": jnp.array([1.0, -2.0, 0.5])}
    reader = Points() if reader is None else reader
    workdir = Workdir(folder)
    folder.mkdir(exist_ok=True)
    with heard() as interruption, contextlib.ExitStack() as stack:
        when = config.checkpoints
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir.checkpoints,
                keep=when.keep,
                keep_every_steps=when.keep_every_steps,
            )
        )
        going = begin(Origin(config, params, {}), workdir, checkpoints, reader)  # type: ignore[arg-type]
        if before is not None:
            before(going)
        going.run(interruption, show=False)
    return going
