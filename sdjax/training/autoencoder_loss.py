"""The objective of the first stage, as arithmetic on arrays.

Esser et al. 2021, eq. 4 to 7, arXiv:2012.09841, in the form of Rombach et al. 2022,
appendix G, arXiv:2112.10752: pixels and LPIPS, a penalty on the latents, and a patch
discriminator whose weight balances its gradient with that of the reconstruction.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdjax.typing import Latent

MAX_ADAPTIVE_WEIGHT = 1e4
ADAPTIVE_EPSILON = 1e-4
BETA = 0.25

Logits = Float[Array, "b h w 1"]


def pixel_distance(
    images: Float[Array, "b height width c"],
    reconstructions: Float[Array, "b height width c"],
    kind: Literal["l1", "l2"],
) -> Float[Array, " b"]:
    """The mean |d| or d² over each picture's elements, float32."""
    d = reconstructions.astype(jnp.float32) - images
    each = jnp.abs(d) if kind == "l1" else jnp.square(d)
    return each.mean(axis=(1, 2, 3))


def codebook_loss(
    z: Latent, quantized: Latent, *, beta: float = BETA
) -> Float[Array, " b"]:
    """Pulls latents and codes together: mean (sg[z_q] − z)² + β mean (z_q − sg[z])².

    van den Oord et al. 2017, eq. 3, arXiv:1711.00937, where β stands on the other
    term; latent diffusion's published models were trained with it on the codes'.
    """
    commitment = jnp.square(jax.lax.stop_gradient(quantized) - z)
    codes = jnp.square(quantized - jax.lax.stop_gradient(z))
    return (commitment + beta * codes).mean(axis=(1, 2, 3))


def generator_loss(fake: Logits) -> Float[Array, ""]:
    """What the autoencoder is to lower: −mean D(x̂)."""
    return -fake.mean()


def hinge_loss(real: Logits, fake: Logits) -> Float[Array, ""]:
    """What the discriminator is to lower. Lim & Ye 2017, arXiv:1705.02894."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def adaptive_weight(
    reconstruction_norm: Float[Array, ""],
    generator_norm: Float[Array, ""],
    weight: float,
) -> Float[Array, ""]:
    """λ = weight · ‖∇nll‖ / (‖∇g‖ + 1e-4), the ratio at most 10⁴.

    Both gradients are with respect to the kernel of the decoder's last convolution.
    Esser et al. 2021, eq. 7.
    """
    ratio = reconstruction_norm / (generator_norm + ADAPTIVE_EPSILON)
    return weight * jnp.clip(ratio, 0, MAX_ADAPTIVE_WEIGHT)
