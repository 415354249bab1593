"""The autoencoder between images and latents, KL-regularised or VQ.

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
from sdjax.errors import SdjaxError
from sdjax.models.attention import SpatialAttention
from sdjax.models.layers import (
    Downsample,
    FeatureMap,
    GroupNorm,
    ResnetBlock,
    Upsample,
    rematerialised,
)
from sdjax.models.quantizer import Codes, Quantizer
from sdjax.typing import Latent, PRNGKey

EPSILON = 1e-6
NO_VARIANCE = -1e4
"""Log variance of a latent that is certain: exp(½·it) is 0 in float32, but it is finite
itself, so that whatever holds moments can be held to finite numbers."""


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
    """Encoder and decoder, with the 1×1 convolutions and the codebook between them.

    With `remat`, gradients take less memory and a third more work.
    """

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Makes the four parts, and the codebook of a VQ autoencoder."""
        config, z = self.config, self.config.latent_channels
        self.encoder = Encoder(config, self.dtype, self.remat)
        self.decoder = Decoder(config, self.dtype, self.remat)
        self.quant_conv = nn.Conv(_moments(config), (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(z, (1, 1), dtype=self.dtype)
        if config.codebook_size is not None:
            self.quantize = Quantizer(config.codebook_size)

    def __call__(
        self, images: Float[Array, "b height width c"]
    ) -> Float[Array, "b height width c"]:
        """Encodes to the mode and decodes: the reconstruction of `images`."""
        return self.decode(self.encode(images).mode())

    def encode(self, images: Float[Array, "b height width c"]) -> Posterior:
        """Maps images in [−1, 1] to the distribution of their latents.

        Those of a VQ autoencoder are certain (log variance `NO_VARIANCE`), and not yet
        snapped to the codebook: what its diffusion models learn.
        """
        moments = self.quant_conv(self.encoder(images)).astype(jnp.float32)
        if self.config.codebook_size is not None:
            return Posterior(moments, jnp.full_like(moments, NO_VARIANCE))
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def nearest_codes(self, latents: Latent) -> Codes:
        """Snaps latents, not × scaling_factor, to a VQ autoencoder's codebook.

        Raises:
            SdjaxError: if the autoencoder has no codebook.
        """
        if self.config.codebook_size is None:
            raise SdjaxError("this autoencoder has no codebook: its config is of KL")
        return self.quantize(latents)

    def decode(
        self, latents: Latent, *, snap: bool = True
    ) -> Float[Array, "b height width c"]:
        """Maps latents, already divided by scaling_factor, to images in about [−1, 1].

        The images have the dtype of `latents` and are not clipped. A VQ autoencoder
        snaps the latents to its codebook first, unless `snap` is false.
        """
        z = latents
        if self.config.codebook_size is not None and snap:
            z = self.nearest_codes(latents).latents
        return self.decoder(self.post_quant_conv(z)).astype(latents.dtype)


class Encoder(nn.Module):
    """Image to moments [B, H/f, W/f, 2z], or latents [B, H/f, W/f, z] of a VQ one."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

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
                remat=self.remat,
                name=f"down_blocks_{level}",
            )(h)
        h = MidBlock(config, self.dtype, self.remat, name="mid_block")(h)
        h = GroupNorm(
            config.norm_num_groups, EPSILON, self.dtype, name="conv_norm_out"
        )(h)
        return _conv(_moments(config), "conv_out", self.dtype)(nn.silu(h))


class Decoder(nn.Module):
    """Latent to image; one res block more per level than the encoder."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Doubles the latent once between any two levels."""
        config = self.config
        last = len(config.block_out_channels) - 1
        h = _conv(config.block_out_channels[-1], "conv_in", self.dtype)(x)
        h = MidBlock(config, self.dtype, self.remat, name="mid_block")(h)
        for i in range(last + 1):
            h = Level(
                config,
                last - i,
                config.layers_per_block + 1,
                resample="up" if i < last else None,
                dtype=self.dtype,
                remat=self.remat,
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
    remat: bool = False

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Maps to this level's channels and, with `resample`, to the next size."""
        config = self.config
        channels = config.block_out_channels[self.level]
        for i in range(self.num_layers):
            x = _resnet(config, channels, f"resnets_{i}", self.dtype, self.remat)(x)
            if config.attention_levels[self.level]:
                x = _attention(config, f"attentions_{i}", self.dtype, self.remat)(x)
        if self.resample == "down":
            x = Downsample(True, self.dtype, name="downsamplers_0")(x)
        if self.resample == "up":
            x = Upsample(self.dtype, name="upsamplers_0")(x)
        return x


class MidBlock(nn.Module):
    """Res block, attention, res block, at the lowest resolution."""

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Keeps the shape."""
        config, C = self.config, x.shape[-1]
        x = _resnet(config, C, "resnets_0", self.dtype, self.remat)(x)
        if config.mid_attention:
            x = _attention(config, "attentions_0", self.dtype, self.remat)(x)
        return _resnet(config, C, "resnets_1", self.dtype, self.remat)(x)


def _resnet(
    config: AutoencoderConfig, channels: int, name: str, dtype: DTypeLike, remat: bool
) -> ResnetBlock:
    block = rematerialised(ResnetBlock, remat)
    return block(channels, config.norm_num_groups, EPSILON, dtype, name=name)


def _attention(
    config: AutoencoderConfig, name: str, dtype: DTypeLike, remat: bool
) -> SpatialAttention:
    block = rematerialised(SpatialAttention, remat)
    return block(config.norm_num_groups, EPSILON, dtype=dtype, name=name)


def _moments(config: AutoencoderConfig) -> int:
    """Channels that the encoder gives: mean and log variance, or the latent alone."""
    z = config.latent_channels
    return 2 * z if config.codebook_size is None else z


def _conv(channels: int, name: str, dtype: DTypeLike) -> nn.Conv:
    return nn.Conv(channels, (3, 3), padding=1, dtype=dtype, name=name)
