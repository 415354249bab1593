"""The training objective of a diffusion model, as arithmetic on arrays.

x_t = √ᾱ x0 + √(1 − ᾱ) ε; the network predicts ε (Ho et al. 2020, arXiv:2006.11239),
v = √ᾱ ε − √(1 − ᾱ) x0 (Salimans & Ho 2022, arXiv:2202.00512) or x0. What depends on
the time alone is a table over all times, from ᾱ in float64.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdjax.config import PredictionType
from sdjax.typing import Latent


def prediction_target(
    x0: Latent,
    eps: Latent,
    t: Int[Array, " b"],
    alpha_bar: Float[np.ndarray, " t"],
    prediction_type: PredictionType,
) -> Latent:
    """What the network should give for x_t."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    signal = jnp.asarray(np.sqrt(alpha_bar), jnp.float32)[t][:, None, None, None]
    noise = jnp.asarray(np.sqrt(1 - alpha_bar), jnp.float32)[t][:, None, None, None]
    return signal * eps - noise * x0


def distance(
    prediction: Latent,
    target: Latent,
    kind: Literal["l2", "l1", "huber"],
    huber_c: float,
) -> Float[Array, " b"]:
    """The mean over each sample's elements, float32.

    "huber" is pseudo-Huber, √(d² + c²) − c with c > 0 (Song & Dhariwal 2023,
    arXiv:2310.14189).
    """
    d = prediction.astype(jnp.float32) - target
    if kind == "l2":
        each = jnp.square(d)
    elif kind == "l1":
        each = jnp.abs(d)
    else:
        # The same without the difference, in which small d would lose their digits.
        each = jnp.square(d) / (jnp.sqrt(jnp.square(d) + huber_c**2) + huber_c)
    return each.mean(axis=(1, 2, 3))


def min_snr_weights(
    alpha_bar: Float[np.ndarray, " t"], prediction_type: PredictionType, gamma: float
) -> Float[np.ndarray, " t"]:
    """The weight of the loss at each time; snr = ᾱ/(1 − ᾱ).

    min(snr, γ)/snr for ε, min(snr, γ)/(snr + 1) for v, min(snr, γ) for x0. At zero
    terminal SNR that is 1, 0 and 0. Hang et al. 2023, section 3.4, arXiv:2303.09556.
    """
    snr = alpha_bar / (1 - alpha_bar)
    if prediction_type == "epsilon":
        return np.divide(gamma, snr, out=np.ones_like(snr), where=snr > gamma)
    if prediction_type == "v_prediction":
        return np.minimum(snr, gamma) / (snr + 1)
    return np.minimum(snr, gamma)
