"""Layers that the U-Net and the autoencoder share, and the sinusoidal embeddings.

Normalisation statistics and the embeddings are float32 whatever `dtype` is; every
epsilon is given by the caller, because the two networks differ in it.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.errors import SdjaxError

FeatureMap = Float[Array, "b h w c"]


def sinusoidal_embedding(
    t: Float[Array, "*n"], dim: int, *, max_period: float = 10_000.0
) -> Float[Array, "*n {dim}"]:
    """Embeds times, or SDXL's sizes, as [cos(t·f), sin(t·f)], float32.

    f_i = max_period^(−2i/dim) for i in [0, dim/2); `dim` is even. Ho et al. 2020,
    arXiv:2006.11239, after Vaswani et al. 2017, section 3.5, cosines first.
    """
    phase = _phase(t, dim, dim // 2, max_period)
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


def guidance_embedding(
    w: Float[Array, "*n"], dim: int = 256
) -> Float[Array, "*n {dim}"]:
    """Embeds `w` = guidance_scale − 1 as [sin(1000w·f), cos(1000w·f)], float32.

    Sines first and f_i = 10⁴^(−i/(dim/2 − 1)), unlike `sinusoidal_embedding`. Luo et
    al. 2023 (latent consistency models), arXiv:2310.04378.
    """
    phase = _phase(1000 * w.astype(jnp.float32), dim, dim // 2 - 1, 10_000.0)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


def _phase(t: Array, dim: int, steps: int, max_period: float) -> Array:
    """Gives t·f for each of dim/2 frequencies f, max_period^(−i/steps)."""
    # Rounded to float32 where torch rounds: at t = 999 one unit in the last place of
    # a frequency already moves the phase by 6e-5.
    index = np.arange(dim // 2, dtype=np.float32)
    exponent = np.float32(-math.log(max_period)) * index / np.float32(steps)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    t = t.astype(jnp.float32)[..., None]
    return t * jnp.broadcast_to(frequencies, t.shape[:-1] + frequencies.shape)


class GroupNorm(nn.Module):
    """Group normalisation with float32 statistics. Wu & He 2018, arXiv:1803.08494."""

    num_groups: int
    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Normalises over height, width and the channels of one group."""
        B, _, _, C = x.shape
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))

        def group_mean(x: Array) -> Array:
            # Row, column, group: short sums, so float32 keeps its digits on images.
            x = x.mean(axis=2).mean(axis=1)  # [B, C]
            x = x.reshape(B, self.num_groups, C // self.num_groups)
            mean = jnp.broadcast_to(x.mean(axis=2, keepdims=True), x.shape)
            return mean.reshape(B, 1, 1, C)

        h = x.astype(jnp.float32)
        h = h - group_mean(h)
        h = h * jax.lax.rsqrt(group_mean(jnp.square(h)) + self.epsilon)
        h = h * scale.astype(jnp.float32).reshape(1, 1, 1, C)
        return (h + bias.astype(jnp.float32).reshape(1, 1, 1, C)).astype(self.dtype)


class TimestepMLP(nn.Module):
    """Linear, SiLU, Linear, in float32; adds a projected guidance embedding first.

    In full precision, too, where a matrix unit would take bfloat16: it is small.
    """

    channels: int

    @nn.compact
    def __call__(
        self,
        embedding: Float[Array, "b d"],
        guidance: Float[Array, "b g"] | None = None,
    ) -> Float[Array, "b {self.channels}"]:
        """Maps an embedding to the width of the time embedding."""
        dense = functools.partial(nn.Dense, precision="highest")
        h = embedding.astype(jnp.float32)
        if guidance is not None:
            project = dense(h.shape[-1], use_bias=False, name="cond_proj")
            h = h + project(guidance.astype(jnp.float32))
        h = nn.silu(dense(self.channels, name="linear_1")(h))
        return dense(self.channels, name="linear_2")(h)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3×3 convolution, twice, around a shortcut.

    The time embedding, where there is one, is added between the two halves; with
    `scale_shift` it scales and shifts the second norm instead (Dhariwal & Nichol 2021,
    section 3, arXiv:2105.05233). With `resample` both branches are halved by averaging
    or doubled by repetition before the first convolution.
    """

    channels: int
    num_groups: int
    epsilon: float
    dtype: DTypeLike = jnp.float32
    scale_shift: bool = False
    resample: Literal["down", "up"] | None = None

    @nn.compact
    def __call__(
        self, x: FeatureMap, temb: Float[Array, "b e"] | None = None
    ) -> FeatureMap:
        """Maps [B, H, W, C] to [B, H, W, channels], H and W resampled."""
        C = self.channels
        norm = lambda name: GroupNorm(
            self.num_groups, self.epsilon, self.dtype, name=name
        )
        h = nn.silu(norm("norm1")(x))
        if self.resample is not None:
            resample = average if self.resample == "down" else repeat
            x, h = resample(x), resample(h)
        h = nn.Conv(C, (3, 3), padding=1, dtype=self.dtype, name="conv1")(h)
        shift = None
        if temb is not None:
            project = nn.Dense(
                2 * C if self.scale_shift else C, dtype=self.dtype, name="time_emb_proj"
            )
            shift = project(nn.silu(temb))[:, None, None, :]
        if self.scale_shift and shift is not None:
            scale, shift = jnp.split(shift, 2, axis=-1)
            h = norm("norm2")(h) * (1 + scale) + shift
        else:
            h = norm("norm2")(h if shift is None else h + shift)
        h = nn.silu(h)
        h = nn.Conv(C, (3, 3), padding=1, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != C:
            x = nn.Conv(C, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x.astype(h.dtype) + h


class Downsample(nn.Module):
    """Halves height and width with a strided 3×3 convolution.

    The U-Net pads every side by one; the autoencoder (`asymmetric`) only the bottom
    and the right.
    """

    asymmetric: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Maps H to ⌈H/2⌉, or ⌊H/2⌋ if asymmetric."""
        pad = (0, 1) if self.asymmetric else (1, 1)
        return nn.Conv(
            x.shape[-1], (3, 3), 2, padding=(pad, pad), dtype=self.dtype, name="conv"
        )(x)


class Upsample(nn.Module):
    """Doubles height and width by repetition, then a 3×3 convolution."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: FeatureMap, size: tuple[int, int] | None = None
    ) -> FeatureMap:
        """Maps H to 2H, cut to `size` (2H or 2H − 1: an odd map was halved upward)."""
        C = x.shape[-1]
        x = repeat(x)
        if size is not None:
            x = x[:, : size[0], : size[1]]
        return nn.Conv(C, (3, 3), padding=1, dtype=self.dtype, name="conv")(x)


def repeat(x: FeatureMap) -> FeatureMap:
    """Doubles height and width: each pixel becomes four."""
    B, H, W, C = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (B, H, 2, W, 2, C))
    return x.reshape(B, 2 * H, 2 * W, C)  # [B, 2H, 2W, C]


def average(x: FeatureMap) -> FeatureMap:
    """Halves height and width: each pixel is the mean of four.

    Raises:
        SdjaxError: if height or width is odd.
    """
    B, H, W, C = x.shape
    if H % 2 or W % 2:
        raise SdjaxError(
            f"a feature map of {H}×{W} cannot be halved by averaging: this U-Net takes "
            "sides that stay even down to its last level"
        )
    x = x.reshape(B, H // 2, 2, W // 2, 2, C)  # [B, H/2, 2, W/2, 2, C]
    return x.mean(axis=(2, 4))  # [B, H/2, W/2, C]


def rematerialised(module: type[nn.Module], remat: bool) -> Any:
    """The module class; with `remat` it forgets its activations until the gradient.

    They are computed again then: less memory, more work, the same parameters. Chen et
    al. 2016, arXiv:1604.06174.
    """
    return nn.remat(module) if remat else module
