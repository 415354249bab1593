"""The U-Net of latent diffusion: one module for every Stable Diffusion network.

Rombach et al. 2022, section 3.2 and 3.3, arXiv:2112.10752; SDXL: Podell et al. 2023,
arXiv:2307.01952. Levels count from the highest resolution; `temb` is the time
embedding, `skips` the feature maps on their way to the upward half.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.config import UNetConfig
from sdjax.models.attention import SpatialAttention, Transformer2D
from sdjax.models.conditioning import check_conditioning, check_residuals
from sdjax.models.layers import (
    Downsample,
    FeatureMap,
    GroupNorm,
    ResnetBlock,
    TimestepMLP,
    Upsample,
    rematerialised,
    sinusoidal_embedding,
)
from sdjax.typing import Conditioning, Context, Latent

EPSILON = 1e-5
TimeEmbedding = Float[Array, "b e"]


class UNet(nn.Module):
    """Predicts ε, v or x0 from a noisy latent: a `sdjax.typing.Network`.

    With `remat`, gradients take less memory and a third more work.
    """

    config: UNetConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Latent, t: Float[Array, " b"], conditioning: Conditioning
    ) -> Latent:
        """Predicts from `x` of unit variance at time `t` in [0, 1000).

        `dtype` is that of the computation; the result has the dtype of `x`.

        Raises:
            SdjaxError: if `conditioning` lacks what `config` needs, holds what it
                does not take, or has the wrong shape.
        """
        config, given = self.config, conditioning
        check_conditioning(config, x, given)
        temb = self._embed_time(t, given)
        context = given.context
        if context is not None:
            context = context.astype(self.dtype)

        h = x
        if given.concat is not None:
            h = jnp.concatenate([x, given.concat.astype(x.dtype)], axis=-1)
        h = _conv(config.block_out_channels[0], "conv_in", self.dtype)(h)
        skips = [h]
        levels = range(len(config.block_out_channels))
        rest = (self.dtype, self.remat)
        for i in levels:
            block = DownBlock(config, i, *rest, name=f"down_blocks_{i}")
            skips += block(skips[-1], temb, context)
        h = MidBlock(config, *rest, name="mid_block")(skips[-1], temb, context)

        check_residuals(given, len(skips))
        if given.residuals is not None:
            *downs, mid = given.residuals
            skips = [s + r.astype(s.dtype) for s, r in zip(skips, downs, strict=True)]
            h = h + mid.astype(h.dtype)

        count = config.layers_per_block + 1
        for i in levels:
            block = UpBlock(config, levels[-1 - i], *rest, name=f"up_blocks_{i}")
            skips, used = skips[:-count], skips[-count:]
            following = skips[-1] if skips else None
            h = block(h, used[::-1], temb, context, following)
        h = GroupNorm(
            config.norm_num_groups, EPSILON, self.dtype, name="conv_norm_out"
        )(h)
        h = _conv(config.out_channels, "conv_out", self.dtype)(nn.silu(h))
        return h.astype(x.dtype)

    def _embed_time(self, t: Array, given: Conditioning) -> TimeEmbedding:
        config = self.config
        channels = config.block_out_channels[0]
        temb = TimestepMLP(4 * channels, name="time_embedding")(
            sinusoidal_embedding(t, channels), given.guidance
        )  # [B, E]
        if given.vector is None:
            return temb
        if config.vector == "class_embedding":
            labels = nn.Embed(
                config.vector_dim or 0, 4 * channels, name="class_embedding"
            )
            return temb + labels(given.vector)
        name = (
            "add_embedding" if config.vector == "add_embedding" else "class_embedding"
        )
        return temb + TimestepMLP(4 * channels, name=name)(given.vector)


class DownBlock(nn.Module):
    """Res blocks and transformers of one level, then halving, except in the last."""

    config: UNetConfig
    level: int
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: FeatureMap, temb: TimeEmbedding, context: Context | None
    ) -> list[FeatureMap]:
        """Gives the feature map after each layer; all of them are skips."""
        config, level, rest = self.config, self.level, (self.dtype, self.remat)
        skips = []
        for i in range(config.layers_per_block):
            x = _resnet(config, level, f"resnets_{i}", *rest)(x, temb)
            x = _attend(config, level, f"attentions_{i}", *rest)(x, context)
            skips.append(x)
        if level < len(config.block_out_channels) - 1:
            if config.resnet_resampling:
                down = _resnet(config, level, "downsamplers_0", *rest, resample="down")
                skips.append(down(x, temb))
            else:
                skips.append(Downsample(dtype=self.dtype, name="downsamplers_0")(x))
        return skips


class MidBlock(nn.Module):
    """Res block, attention, res block, at the lowest resolution."""

    config: UNetConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: FeatureMap, temb: TimeEmbedding, context: Context | None
    ) -> FeatureMap:
        """Keeps the shape."""
        config, rest = self.config, (self.dtype, self.remat)
        x = _resnet(config, -1, "resnets_0", *rest)(x, temb)
        x = _attend(config, None, "attentions_0", *rest)(x, context)
        return _resnet(config, -1, "resnets_1", *rest)(x, temb)


class UpBlock(nn.Module):
    """One layer more than on the way down, each with a skip; then doubling."""

    config: UNetConfig
    level: int
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: FeatureMap,
        skips: list[FeatureMap],
        temb: TimeEmbedding,
        context: Context | None,
        following: FeatureMap | None,
    ) -> FeatureMap:
        """Joins `skips` in the order given and ends at the size of `following`."""
        config, level, rest = self.config, self.level, (self.dtype, self.remat)
        for i, skip in enumerate(skips):
            x = jnp.concatenate([x, skip], axis=-1)
            x = _resnet(config, level, f"resnets_{i}", *rest)(x, temb)
            x = _attend(config, level, f"attentions_{i}", *rest)(x, context)
        if following is None:
            return x
        if config.resnet_resampling:
            up = _resnet(config, level, "upsamplers_0", *rest, resample="up")
            return up(x, temb)
        _, H, W, _ = following.shape
        return Upsample(self.dtype, name="upsamplers_0")(x, (H, W))


def _resnet(
    config: UNetConfig,
    level: int,
    name: str,
    dtype: DTypeLike,
    remat: bool,
    *,
    resample: Literal["down", "up"] | None = None,
) -> ResnetBlock:
    return rematerialised(ResnetBlock, remat)(
        config.block_out_channels[level],
        config.norm_num_groups,
        EPSILON,
        dtype,
        config.scale_shift_norm,
        resample,
        name=name,
    )


def _attend(
    config: UNetConfig, level: int | None, name: str, dtype: DTypeLike, remat: bool
) -> Callable[[FeatureMap, Context | None], FeatureMap]:
    """The attention of a level, or of the middle block; nothing where it has none."""
    place = -1 if level is None else level
    depth = config.transformer_depth[place]
    if level is None:
        depth = config.mid_transformer_depth
    heads, groups = config.num_heads[place], config.norm_num_groups
    if depth == 0:
        return lambda x, context: x
    if config.plain_attention:
        block = rematerialised(SpatialAttention, remat)
        plain = block(groups, EPSILON, heads, dtype, name=name)
        return lambda x, context: plain(x)
    only = level is not None and config.cross_attention_only[level]
    return rematerialised(Transformer2D, remat)(
        depth, heads, groups, config.linear_projection, only, dtype, name=name
    )


def _conv(channels: int, name: str, dtype: DTypeLike) -> nn.Conv:
    return nn.Conv(channels, (3, 3), padding=1, dtype=dtype, name=name)
