"""Names of the autoencoder's leaves, in diffusers and in CompVis files.

CompVis numbers the decoder's levels by resolution, diffusers in the order they run:
up_blocks.i is decoder.up.(n - 1 - i). CompVis attention layers are 1×1 convolutions.
"""

import re
from collections.abc import Iterator

from sdjax.config import AutoencoderConfig
from sdjax.weights.entries import ROOT, Entry, Site, conv, embedding, linear, norm

ORIGINAL_PREFIX = "first_stage_model."

# Spellings of one attention layer: diffusers, CompVis, diffusers before 0.17.
_ATTENTION = {
    "group_norm": ("group_norm", "norm"),
    "to_q": ("to_q", "q", "query"),
    "to_k": ("to_k", "k", "key"),
    "to_v": ("to_v", "v", "value"),
    "to_out.0": ("to_out.0", "proj_out", "proj_attn"),
}
_DIFFUSERS_NAME = {old: new for new, names in _ATTENTION.items() for old in names}
_ORIGINAL_NAME = {old: names[1] for names in _ATTENTION.values() for old in names}
_IN_DIFFUSERS = re.compile(r"(.*\.attentions\.\d+)\.(.+)\.(weight|bias)")
_IN_ORIGINAL = re.compile(r"(.*\.(?:attn_1|attn\.\d+))\.(.+)\.(weight|bias)")


def vae_entries(config: AutoencoderConfig) -> Iterator[Entry]:
    """Every leaf of the autoencoder that `config` describes."""
    latent, moments = config.latent_channels, _moments(config)
    yield from _encoder(config, ROOT.at("encoder"))
    yield from _decoder(config, ROOT.at("decoder"))
    yield from conv(ROOT.at("quant_conv"), moments, moments, 1)
    yield from conv(ROOT.at("post_quant_conv"), latent, latent, 1)
    if config.codebook_size is not None:
        yield from embedding(
            ROOT.at("quantize").at("embedding"), config.codebook_size, latent
        )


def _moments(config: AutoencoderConfig) -> int:
    """Channels that the encoder gives: a VQ autoencoder's has no variances."""
    z = config.latent_channels
    return 2 * z if config.codebook_size is None else z


def modern_key(key: str) -> str:
    """A key of a diffusers folder with today's names of attention layers."""
    return _respell(key, _IN_DIFFUSERS, _DIFFUSERS_NAME)


def modern_original(key: str) -> str:
    """A key of a single file with CompVis' names of attention layers."""
    return _respell(key, _IN_ORIGINAL, _ORIGINAL_NAME)


def _respell(key: str, pattern: re.Pattern[str], names: dict[str, str]) -> str:
    match = pattern.fullmatch(key)
    if match is None or match[2] not in names:
        return key
    return f"{match[1]}.{names[match[2]]}.{match[3]}"


def _encoder(config: AutoencoderConfig, site: Site) -> Iterator[Entry]:
    channels = config.block_out_channels
    yield from conv(site.at("conv_in"), config.in_channels, channels[0], 3)
    width = channels[0]
    for level, out in enumerate(channels):
        block = site.at(f"down_blocks.{level}", f"down.{level}")
        for layer in range(config.layers_per_block):
            yield from _resnet(
                block.at(f"resnets.{layer}", f"block.{layer}"), width, out
            )
            if config.attention_levels[level]:
                yield from _attention(
                    block.at(f"attentions.{layer}", f"attn.{layer}"), out
                )
            width = out
        if level < len(channels) - 1:
            down = block.at("downsamplers.0.conv", "downsample.conv")
            yield from conv(down, out, out, 3)
    yield from _middle(config, site, width)
    yield from norm(site.at("conv_norm_out", "norm_out"), width)
    yield from conv(site.at("conv_out"), width, _moments(config), 3)


def _decoder(config: AutoencoderConfig, site: Site) -> Iterator[Entry]:
    channels = config.block_out_channels
    width = channels[-1]
    yield from conv(site.at("conv_in"), config.latent_channels, width, 3)
    yield from _middle(config, site, width)
    for index in range(len(channels)):
        level = len(channels) - 1 - index
        out = channels[level]
        block = site.at(f"up_blocks.{index}", f"up.{level}")
        for layer in range(config.layers_per_block + 1):
            yield from _resnet(
                block.at(f"resnets.{layer}", f"block.{layer}"), width, out
            )
            if config.attention_levels[level]:
                yield from _attention(
                    block.at(f"attentions.{layer}", f"attn.{layer}"), out
                )
            width = out
        if level:
            yield from conv(block.at("upsamplers.0.conv", "upsample.conv"), out, out, 3)
    yield from norm(site.at("conv_norm_out", "norm_out"), width)
    yield from conv(site.at("conv_out"), width, config.out_channels, 3)


def _middle(config: AutoencoderConfig, site: Site, width: int) -> Iterator[Entry]:
    block = site.at("mid_block", "mid")
    yield from _resnet(block.at("resnets.0", "block_1"), width, width)
    if config.mid_attention:
        yield from _attention(block.at("attentions.0", "attn_1"), width)
    yield from _resnet(block.at("resnets.1", "block_2"), width, width)


def _resnet(site: Site, in_: int, out: int) -> Iterator[Entry]:
    yield from norm(site.at("norm1"), in_)
    yield from conv(site.at("conv1"), in_, out, 3)
    yield from norm(site.at("norm2"), out)
    yield from conv(site.at("conv2"), out, out, 3)
    if in_ != out:
        yield from conv(site.at("conv_shortcut", "nin_shortcut"), in_, out, 1)


def _attention(site: Site, width: int) -> Iterator[Entry]:
    yield from norm(site.at("group_norm", "norm"), width)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        place = site.at(name, _ORIGINAL_NAME[name])
        yield from linear(place, width, width, form="pointwise")
