"""Everything a training run carries from step to step: arrays, and nothing else."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sdjax.training.optimizer import updates_done
from sdjax.typing import Params


class TrainState(NamedTuple):
    """A pytree that a step takes and gives back, and that a checkpoint holds.

    Attributes:
        step: calls of the step so far, those whose update was left out included.
        params: what learns, by component, float32.
        opt_state: the optimizer's.
        ema: the moving average of `params`; None: not kept.
        frozen: what does not learn, by component; a checkpoint leaves it out.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params | None
    frozen: Params


def make_state(
    params: Params,
    frozen: Params,
    optimizer: optax.GradientTransformation,
    *,
    keep_ema: bool,
) -> TrainState:
    """The state before the first step; its average starts at the parameters.

    What learns becomes float32. The arrays given are taken over where they are so
    already: a step that donates its state frees them.
    """
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    copy = lambda tree: jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        ema=copy(params) if keep_ema else None,
        frozen=jax.tree.map(jnp.asarray, frozen),
    )


def apply_gradients(
    state: TrainState,
    gradients: Params,
    optimizer: optax.GradientTransformation,
    *,
    finite: Float[Array, ""],
    ema_decay: float | None,
) -> TrainState:
    """Updates parameters, optimizer and average, unless `finite` is 0."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay is not None and ema is not None:
        ema = update_ema(ema, params, updates_done(opt_state), ema_decay)
    new = (params, opt_state, ema)
    old = (state.params, state.opt_state, state.ema)
    keep = lambda new, old: jnp.where(finite > 0, new, old)
    params, opt_state, ema = jax.tree.map(keep, new, old)
    return TrainState(state.step + 1, params, opt_state, ema, state.frozen)


def update_ema(
    ema: Params, params: Params, count: Int[Array, ""], decay: float
) -> Params:
    """Moves the average towards `params` at the update numbered `count`, from 1.

    The decay is min(decay, (1 + n)/(10 + n)), as in latent-diffusion's LitEma.
    """
    n = count.astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda e, p: e - share * (e - p), ema, params)
