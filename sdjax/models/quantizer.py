"""Vector quantisation: each latent becomes the nearest of a table of codes.

van den Oord et al. 2017, section 3, arXiv:1711.00937.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from sdjax.typing import Latent

DISTANCE_BYTES = 256 * 2**20
"""Largest float32 table of distances held at once."""


class Codes(NamedTuple):
    """What quantisation gives.

    Attributes:
        latents: the codes, whose gradient goes to what was quantised as if it had not
            been (straight through).
        codes: the codes, whose gradient goes to the codebook.
        indices: which codes they are.
    """

    latents: Latent
    codes: Latent
    indices: Int[Array, "b h w"]


class Quantizer(nn.Module):
    """A codebook of `codebook_size` rows, as wide as a latent; float32 throughout."""

    codebook_size: int

    @nn.compact
    def __call__(self, latents: Latent) -> Codes:
        """Finds the code with the least squared distance for each position."""
        B, H, W, C = latents.shape
        book = nn.Embed(self.codebook_size, C, name="embedding").embedding
        book = book.astype(jnp.float32)
        z = latents.astype(jnp.float32)
        indices = _nearest(z.reshape(B * H * W, C), book).reshape(B, H, W)
        codes = book[indices]  # [B, H, W, C]
        straight = z + jax.lax.stop_gradient(codes - z)
        return Codes(straight.astype(latents.dtype), codes, indices)


def _nearest(z: Float[Array, "n c"], book: Float[Array, "k c"]) -> Int[Array, " n"]:
    """Argmin over k of |z − e_k|², the first of equals, some rows at a time."""
    z, book = jax.lax.stop_gradient((z, book))
    norms = jnp.square(book).sum(axis=1)  # [K]

    def nearest(z: Float[Array, " c"]) -> Int[Array, ""]:
        # |z|² is the same for all codes.
        return jnp.argmin(norms - 2 * jnp.matmul(book, z, precision="highest"))

    rows = max(1, DISTANCE_BYTES // (4 * len(book)))
    if rows >= len(z):
        return jax.vmap(nearest)(z)
    return jax.lax.map(nearest, z, batch_size=rows)
