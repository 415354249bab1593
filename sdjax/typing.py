"""Array aliases and the protocols that the parts of sdjax agree on.

Dimensions: B batch, H W latent height and width, C channels, L tokens of a prompt,
D width. Everything is NHWC.
"""

from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, Int, PyTree, Shaped

Latent = Float[Array, "b h w c"]
Image = Float[Array, "b height width 3"]
Tokens = Int[Array, "b l"]
Context = Float[Array, "b l d"]
Params = PyTree[Any]
"""Nested dict of arrays."""


class Conditioning(NamedTuple):
    """What a network is conditioned on; one pytree for every task.

    Attributes:
        context: cross-attention states (text, classes, layouts), [B, L, D].
        vector: added to the time embedding through an MLP [B, V], or integer
            labels [B] where the network embeds them.
        concat: stacked on the latent's channels, [B, H, W, K].
        residuals: added to the skip connections, one per skip in the order they are
            made, then one for the mid block (ControlNet).
        guidance: embedding of the guidance scale [B, G] for guidance-distilled
            networks (LCM).
    """

    context: Context | None = None
    vector: Shaped[Array, "b ..."] | None = None
    concat: Latent | None = None
    residuals: tuple[Latent, ...] | None = None
    guidance: Float[Array, "b g"] | None = None


class Network(Protocol):
    """The raw network: ε or v (or x0), as it was trained to predict."""

    def __call__(
        self, x: Latent, t: Float[Array, " b"], conditioning: Conditioning
    ) -> Latent:
        """Predicts from `x` of unit variance at time `t` in [0, 1000)."""
        ...


class Level(NamedTuple):
    """One noise level, as a network sees it: D(x) = c_skip·x + c_out·F(c_in·x, t).

    `x` is variance preserving, x = αx0 + σε with α² + σ² = 1. All scalars, float32.
    """

    t: Float[Array, ""]
    c_in: Float[Array, ""]
    c_skip: Float[Array, ""]
    c_out: Float[Array, ""]


class Denoiser(Protocol):
    """Estimates the clean latent x0 from a noisy one."""

    def __call__(self, x: Latent, level: Level) -> Latent:
        """Returns x0 for `x` = αx0 + σε at `level`."""
        ...


PRNGKey = jax.Array
