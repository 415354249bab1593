"""The KL-regularised autoencoder between images and latents.

Rombach et al. 2022, section 3.1 and appendix G, arXiv:2112.10752. Every norm has
ε = 1e-6.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.config import AutoencoderConfig
from sdjax.models.attention import attention
from sdjax.models.layers import (
    Downsample,
    FeatureMap,
    GroupNorm,
    ResnetBlock,
    Upsample,
)
from sdjax.typing import Latent, PRNGKey

EPSILON = 1e-6


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents, not yet × scaling_factor, float32.

    Kingma & Welling 2014, appendix B, arXiv:1312.6114.
    """

    mean: Latent
    logvar: Latent

    def sample(self, key: PRNGKey) -> Latent:
        """Draws one latent per image."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def mode(self) -> Latent:
        """Gives the most probable latent."""
        return self.mean

    def kl(self) -> Float[Array, " b"]:
        """Gives the divergence from N(0, 1), in nats, summed over one latent."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1 - self.logvar
        return 0.5 * terms.sum(axis=(1, 2, 3))


class Autoencoder(nn.Module):
    """Encoder and decoder, with the 1×1 convolutions between them."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes the four parts."""
        z = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.quant_conv = nn.Conv(2 * z, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(z, (1, 1), dtype=self.dtype)

    def __call__(
        self, images: Float[Array, "b height width c"]
    ) -> Float[Array, "b height width c"]:
        """Encodes to the mode and decodes: the reconstruction of `images`."""
        return self.decode(self.encode(images).mode())

    def encode(self, images: Float[Array, "b height width c"]) -> Posterior:
        """Maps images in [−1, 1] to the distribution of their latents."""
        moments = self.quant_conv(self.encoder(images)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Latent) -> Float[Array, "b height width c"]:
        """Maps latents, already divided by scaling_factor, to images in about [−1, 1].

        The images have the dtype of `latents` and are not clipped.
        """
        return self.decoder(self.post_quant_conv(latents)).astype(latents.dtype)


class Encoder(nn.Module):
    """Image to moments [B, H/f, W/f, 2z]."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Halves the image once between any two levels."""
        config = self.config
        last = len(config.block_out_channels) - 1
        h = _conv(config.block_out_channels[0], "conv_in", self.dtype)(x)
        for level in range(last + 1):
            h = Level(
                config,
                level,
                config.layers_per_block,
                resample="down" if level < last else None,
                dtype=self.dtype,
                name=f"down_blocks_{level}",
            )(h)
        h = MidBlock(config, self.dtype, name="mid_block")(h)
        h = GroupNorm(
            config.norm_num_groups, EPSILON, self.dtype, name="conv_norm_out"
        )(h)
        return _conv(2 * config.latent_channels, "conv_out", self.dtype)(nn.silu(h))


class Decoder(nn.Module):
    """Latent to image; one res block more per level than the encoder."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Doubles the latent once between any two levels."""
        config = self.config
        last = len(config.block_out_channels) - 1
        h = _conv(config.block_out_channels[-1], "conv_in", self.dtype)(x)
        h = MidBlock(config, self.dtype, name="mid_block")(h)
        for i in range(last + 1):
            h = Level(
                config,
                last - i,
                config.layers_per_block + 1,
                resample="up" if i < last else None,
                dtype=self.dtype,
                name=f"up_blocks_{i}",
            )(h)
        h = GroupNorm(
            config.norm_num_groups, EPSILON, self.dtype, name="conv_norm_out"
        )(h)
        return _conv(config.out_channels, "conv_out", self.dtype)(nn.silu(h))


class Level(nn.Module):
    """The res blocks and attentions of one resolution, then the change to the next."""

    config: AutoencoderConfig
    level: int
    num_layers: int
    resample: str | None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Maps to this level's channels and, with `resample`, to the next size."""
        config = self.config
        channels = config.block_out_channels[self.level]
        groups = config.norm_num_groups
        for i in range(self.num_layers):
            x = ResnetBlock(channels, groups, EPSILON, self.dtype, name=f"resnets_{i}")(
                x
            )
            if config.attention_levels[self.level]:
                x = SpatialAttention(groups, self.dtype, name=f"attentions_{i}")(x)
        if self.resample == "down":
            x = Downsample(True, self.dtype, name="downsamplers_0")(x)
        if self.resample == "up":
            x = Upsample(self.dtype, name="upsamplers_0")(x)
        return x


class MidBlock(nn.Module):
    """Res block, attention, res block, at the lowest resolution."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Keeps the shape."""
        groups = self.config.norm_num_groups
        resnet = lambda name: ResnetBlock(
            x.shape[-1], groups, EPSILON, self.dtype, name=name
        )
        x = resnet("resnets_0")(x)
        x = SpatialAttention(groups, self.dtype, name="attentions_0")(x)
        return resnet("resnets_1")(x)


class SpatialAttention(nn.Module):
    """Self-attention with one head over all channels, around a residual."""

    num_groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Mixes the H·W positions."""
        B, H, W, C = x.shape
        h = GroupNorm(self.num_groups, EPSILON, self.dtype, name="group_norm")(x)
        h = h.reshape(B, H * W, 1, C)  # [B, H*W, 1, C]
        q, k, v = (nn.Dense(C, dtype=self.dtype, name=f"to_{n}")(h) for n in "qkv")
        h = nn.Dense(C, dtype=self.dtype, name="to_out_0")(attention(q, k, v))
        return x + h.reshape(B, H, W, C)  # [B, H, W, C]


def _conv(channels: int, name: str, dtype: DTypeLike) -> nn.Conv:
    return nn.Conv(channels, (3, 3), padding=1, dtype=dtype, name=name)
