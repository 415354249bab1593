"""The sampling loop: runs the table of any sampler; pure, and compiled once.

The noise of image i comes from its own key alone, never from its place in a batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sdjax.diffusion.table import SLOTS, Tableau
from sdjax.typing import Denoiser, Latent, Level

NoiseFn = Callable[[Int[Array, ""]], Latent]
"""Gives the unit noise of a row of the table."""

OnStep = Callable[[Int[Array, ""], Int[Array, ""]], Bool[Array, ""]]
"""Is told the row and the sampling step just made; returns whether to stop."""

State = Float[Array, "slots b h w c"]


def sample(
    denoise: Denoiser,
    x: Latent,
    tableau: Tableau,
    noise: NoiseFn,
    *,
    x0: Latent | None = None,
    on_step: OnStep | None = None,
) -> Latent:
    """Samples from noise, or from a noised image, in float32.

    One program runs every padded table: sampler, number of steps, η and strength are in
    the values of `tableau`. The loop over a table without padding can be differentiated
    in reverse mode, where there is no `on_step`.

    Args:
        denoise: estimates the clean latents.
        x: noise of unit variance.
        tableau: of the sampler.
        noise: of the samplers that add any.
        x0: clean latents to start from, for image-to-image; they are noised by `x` to
            the table's first level.
        on_step: called in the loop after each row; may end it early.

    Returns:
        The clean latents, or what they were when `on_step` ended the loop.
    """
    start = tableau.init_scale * x.astype(jnp.float32)
    if x0 is not None:
        start = tableau.start_alpha * x0 + tableau.start_sigma * x
    state = jnp.zeros((SLOTS, *x.shape), jnp.float32).at[0].set(start)

    def row(k: Int[Array, ""], state: State) -> State:
        return _row(denoise, noise, tableau, k, state)

    count = tableau.update.shape[0]
    if tableau.num_rows is None and on_step is None:
        rows = jnp.arange(count)
        state, _ = jax.lax.scan(lambda s, k: (row(k, s), None), state, rows)
        return state[0]
    last = count if tableau.num_rows is None else tableau.num_rows
    return _run(row, state, jnp.asarray(last), jnp.asarray(tableau.step), on_step)


def keyed_noise(keys: Key[Array, " b"], shape: tuple[int, ...]) -> NoiseFn:
    """Noise of image i and row k from `fold_in(keys[i], k + 1)`; fold 0 is the start.

    Args:
        keys: one per image.
        shape: of one latent, (h, w, c).
    """
    return lambda k: _normal(keys, k + 1, shape)


def initial_noise(
    keys: Key[Array, " b"], shape: tuple[int, ...]
) -> Float[Array, "b h w c"]:
    """Noise that sampling starts from, of unit variance: `fold_in(keys[i], 0)`."""
    return _normal(keys, 0, shape)


def given_noise(values: Float[Array, "k b h w c"]) -> NoiseFn:
    """Noise handed in, for each row of the table."""
    return lambda k: jnp.asarray(values)[k]


def _normal(
    keys: Key[Array, " b"], index: int | Int[Array, ""], shape: tuple[int, ...]
) -> Float[Array, "b h w c"]:
    draw = lambda key: jax.random.normal(
        jax.random.fold_in(key, index), shape, jnp.float32
    )
    return jax.vmap(draw)(keys)


def _row(
    denoise: Denoiser, noise: NoiseFn, tableau: Tableau, k: Int[Array, ""], state: State
) -> State:
    """Evaluates the network once and makes the next state."""
    update = jnp.asarray(tableau.update)[k]
    denoised = denoise(state[0], Level(*jnp.asarray(tableau.level)[k]))
    z = jax.lax.cond(
        jnp.any(update[:, -1] != 0),
        lambda: noise(k).astype(jnp.float32),
        lambda: jnp.zeros_like(denoised),
    )
    # Explicit sums: a dot would run in bfloat16 passes on a TPU.
    terms = [term[None] for term in (*state, denoised, z)]  # each [1, B, h, w, c]
    weights = update[:, :, None, None, None, None]  # [slots, columns, 1, 1, 1, 1]
    return sum(
        (weights[:, j] * term for j, term in enumerate(terms)), jnp.zeros_like(state)
    )


def _run(
    row: Callable[[Int[Array, ""], State], State],
    state: State,
    last: Int[Array, ""],
    step: Int[Array, " k"],
    on_step: OnStep | None,
) -> Latent:
    """Runs rows until the `last` one, or until `on_step` says so."""

    def body(
        carry: tuple[Int[Array, ""], Bool[Array, ""], State],
    ) -> tuple[Int[Array, ""], Bool[Array, ""], State]:
        k, stop, state = carry
        state = row(k, state)
        if on_step is not None:
            # The barrier makes the call wait until the row has been computed.
            state, done = jax.lax.optimization_barrier((state, k))
            stop = on_step(done, step[done]).astype(bool)
        return k + 1, stop, state

    first = (jnp.int32(0), jnp.bool_(False), state)
    _, _, state = jax.lax.while_loop(lambda c: (c[0] < last) & ~c[1], body, first)
    return state[0]
