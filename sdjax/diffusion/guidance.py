"""Classifier-free guidance: ε̂ = ε_u + g(ε_c − ε_u).

Ho & Salimans 2022, arXiv:2207.12598, with g = 1 + w of the paper, so g = 1 is off.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdjax.errors import SdjaxError
from sdjax.typing import Conditioning, Latent, Network

Scale = Float[Array, ""] | Float[Array, " b"] | float


def guide(
    network: Network,
    unconditional: Conditioning,
    scale: Scale,
    rescale: Scale = 0.0,
) -> Network:
    """A network whose every call is one call of `network` on twice the batch.

    The unconditional half comes first. `scale` and `rescale` may be traced, one for all
    or one per sample.

    Args:
        network: predicts ε, v or x0.
        unconditional: has the same fields and shapes as the conditioning that the
            guided network is called with.
        scale: g.
        rescale: φ in [0, 1], how far the result is brought back to the standard
            deviation of the conditional prediction; Lin et al. 2023, section 3.4,
            arXiv:2305.08891.
    """

    def guided(x: Latent, t: Float[Array, " b"], conditioning: Conditioning) -> Latent:
        both = _stack(unconditional, conditioning)
        twice = jnp.concatenate([x, x])  # [2B, H, W, C]
        output = network(twice, jnp.concatenate([t, t]), both).astype(jnp.float32)
        without, given = jnp.split(output, 2)  # [B, H, W, C]
        result = without + _per_sample(scale) * (given - without)
        phi = _per_sample(rescale)
        return phi * _match_deviation(result, given) + (1 - phi) * result

    return guided


def _stack(unconditional: Conditioning, conditioning: Conditioning) -> Conditioning:
    for name, without, given in zip(
        Conditioning._fields, unconditional, conditioning, strict=True
    ):
        if (without is None) != (given is None):
            raise SdjaxError(
                f"conditioning.{name} must be given with and without the prompt, or "
                "with neither"
            )
    return jax.tree.map(
        lambda *pair: jnp.concatenate(pair),  # [2B, ...]
        unconditional,
        conditioning,
    )


def _per_sample(value: Scale) -> Array:
    """One number for all, or [B, 1, 1, 1]."""
    value = jnp.asarray(value, jnp.float32)
    return value.reshape(-1, 1, 1, 1) if value.ndim else value


def _match_deviation(result: Latent, given: Latent) -> Latent:
    """Scales each sample of `result` to the standard deviation of `given`."""
    axes = (1, 2, 3)
    deviation = jnp.std(result, axes, keepdims=True)  # [B, 1, 1, 1]
    wanted = jnp.std(given, axes, keepdims=True)
    return result * (wanted / jnp.where(deviation > 0, deviation, 1.0))
