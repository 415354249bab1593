"""Preconditioning: a Network, which predicts ε, v or x0, as a Denoiser.

D(x) = c_skip·x + c_out·F(c_in·x, t), with the coefficients of the table's level.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sdjax.typing import Conditioning, Denoiser, Latent, Level, Network

Clip = Float[Array, ""] | float


def make_denoiser(
    network: Network, conditioning: Conditioning, *, clip: Clip | None = None
) -> Denoiser:
    """Binds a network and what it is conditioned on.

    Args:
        network: any dtype inside; its output is taken to float32.
        conditioning: of the same batch as the latents.
        clip: limits the predicted x0 to [-clip, clip]; None or infinity: no limit.
    """

    def denoise(x: Latent, level: Level) -> Latent:
        t = jnp.full(x.shape[:1], level.t)  # [B]
        output = network(level.c_in * x, t, conditioning).astype(jnp.float32)
        x0 = level.c_skip * x + level.c_out * output
        return x0 if clip is None else jnp.clip(x0, -clip, clip)

    return denoise
