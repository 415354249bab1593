"""Names of the U-Net's leaves, in diffusers and in CompVis/SGM files.

CompVis counts blocks through the levels: input block 0 is conv_in, then L res blocks
and a downsampler per level; output blocks are L + 1 per level, the upsampler riding on
the last. Rombach et al. 2022, arXiv:2112.10752, and its repository's openaimodel.py.
"""

from collections.abc import Iterator

from sdjax.config import UNetConfig
from sdjax.weights.entries import ROOT, Entry, Site, conv, linear, norm

ORIGINAL_PREFIX = "model.diffusion_model."


def unet_entries(config: UNetConfig) -> Iterator[Entry]:
    """Every leaf of the U-Net that `config` describes."""
    channels = config.block_out_channels
    yield from _embeddings(config)
    yield from conv(
        ROOT.at("conv_in", "input_blocks.0.0"), config.in_channels, channels[0], 3
    )
    skips = yield from _down(config)
    yield from _middle(config)
    yield from _up(config, skips)
    yield from norm(ROOT.at("conv_norm_out", "out.0"), channels[0])
    yield from conv(ROOT.at("conv_out", "out.2"), channels[0], config.out_channels, 3)


def _embeddings(config: UNetConfig) -> Iterator[Entry]:
    width = config.block_out_channels[0]
    site = ROOT.at("time_embedding", "time_embed")
    yield from _mlp(site, width, 4 * width, ("0", "2"))
    if config.guidance_dim:
        yield from linear(
            site.at("cond_proj"), config.guidance_dim, width, has_bias=False
        )
    if config.vector is None or config.vector_dim is None:
        return
    if config.vector == "class_embedding":
        shape = (config.vector_dim, 4 * width)
        yield Entry("class_embedding.weight", "label_emb.weight", shape, "embedding")
        return
    name = "add_embedding" if config.vector == "add_embedding" else "class_embedding"
    yield from _mlp(
        ROOT.at(name, "label_emb.0"), config.vector_dim, 4 * width, ("0", "2")
    )


def _mlp(site: Site, in_: int, out: int, original: tuple[str, str]) -> Iterator[Entry]:
    yield from linear(site.at("linear_1", original[0]), in_, out)
    yield from linear(site.at("linear_2", original[1]), out, out)


def _down(config: UNetConfig):
    """Yields the down path's entries; returns the channels of the skips."""
    channels = config.block_out_channels
    width, block, skips = channels[0], 0, [channels[0]]
    for level, out in enumerate(channels):
        for layer in range(config.layers_per_block):
            block += 1
            site = Site(f"down_blocks.{level}.", f"input_blocks.{block}.")
            yield from _resnet(config, site.at(f"resnets.{layer}", "0"), width, out)
            if config.transformer_depth[level]:
                attention = site.at(f"attentions.{layer}", "1")
                yield from _attention(config, attention, level)
            width = out
            skips.append(width)
        if level < len(channels) - 1:
            block += 1
            site = Site(f"down_blocks.{level}.", f"input_blocks.{block}.")
            if config.resnet_resampling:
                yield from _resnet(config, site.at("downsamplers.0", "0"), width, width)
            else:
                yield from conv(site.at("downsamplers.0.conv", "0.op"), width, width, 3)
            skips.append(width)
    return skips


def _middle(config: UNetConfig) -> Iterator[Entry]:
    width = config.block_out_channels[-1]
    site = ROOT.at("mid_block", "middle_block")
    yield from _resnet(config, site.at("resnets.0", "0"), width, width)
    if config.mid_transformer_depth:
        yield from _attention(config, site.at("attentions.0", "1"), None)
    after = "2" if config.mid_transformer_depth else "1"
    yield from _resnet(config, site.at("resnets.1", after), width, width)


def _up(config: UNetConfig, skips: list[int]) -> Iterator[Entry]:
    levels = len(config.block_out_channels)
    width, block = config.block_out_channels[-1], 0
    for index in range(levels):
        level = levels - 1 - index
        out, depth = config.block_out_channels[level], config.transformer_depth[level]
        for layer in range(config.layers_per_block + 1):
            site = Site(f"up_blocks.{index}.", f"output_blocks.{block}.")
            resnet = site.at(f"resnets.{layer}", "0")
            yield from _resnet(config, resnet, width + skips.pop(), out)
            if depth:
                attention = site.at(f"attentions.{layer}", "1")
                yield from _attention(config, attention, level)
            if layer == config.layers_per_block and level:
                up = site.at("upsamplers.0", "2" if depth else "1")
                if config.resnet_resampling:
                    yield from _resnet(config, up, out, out)
                else:
                    yield from conv(up.at("conv"), out, out, 3)
            width = out
            block += 1


def _resnet(config: UNetConfig, site: Site, in_: int, out: int) -> Iterator[Entry]:
    yield from norm(site.at("norm1", "in_layers.0"), in_)
    yield from conv(site.at("conv1", "in_layers.2"), in_, out, 3)
    embedding = site.at("time_emb_proj", "emb_layers.1")
    shifts = 2 * out if config.scale_shift_norm else out
    yield from linear(embedding, 4 * config.block_out_channels[0], shifts)
    yield from norm(site.at("norm2", "out_layers.0"), out)
    yield from conv(site.at("conv2", "out_layers.3"), out, out, 3)
    if in_ != out:
        yield from conv(site.at("conv_shortcut", "skip_connection"), in_, out, 1)


def _attention(config: UNetConfig, site: Site, level: int | None) -> Iterator[Entry]:
    """The attention of a level; None: of the middle block."""
    place = -1 if level is None else level
    width = config.block_out_channels[place]
    if config.plain_attention:
        return _plain(site, width, config.num_heads[place])
    if level is None:
        return _blocks(config, site, width, config.mid_transformer_depth, False)
    depth, only = config.transformer_depth[level], config.cross_attention_only[level]
    return _blocks(config, site, width, depth, only)


def _plain(site: Site, width: int, heads: int) -> Iterator[Entry]:
    """CompVis packs q, k and v in one 1-D convolution, head by head."""
    yield from norm(site.at("group_norm", "norm"), width)
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        place = site.at(name, "qkv")
        for entry in linear(place, width, width):
            yield entry._replace(form="by_head", part=part, heads=heads)
    yield from linear(site.at("to_out.0", "proj_out"), width, width, form="conv1d")


def _blocks(
    config: UNetConfig, site: Site, width: int, depth: int, cross_only: bool
) -> Iterator[Entry]:
    yield from norm(site.at("norm"), width)
    yield from _projection(config, site.at("proj_in"), width)
    for index in range(depth):
        block = site.at(f"transformer_blocks.{index}")
        yield from norm(block.at("norm1"), width)
        first = config.context_dim if cross_only else width
        yield from _projections(block.at("attn1"), width, first)
        yield from norm(block.at("norm2"), width)
        yield from _projections(block.at("attn2"), width, config.context_dim)
        yield from norm(block.at("norm3"), width)
        yield from linear(block.at("ff.net.0.proj"), width, 8 * width)
        yield from linear(block.at("ff.net.2"), 4 * width, width)
    yield from _projection(config, site.at("proj_out"), width)


def _projection(config: UNetConfig, site: Site, width: int) -> Iterator[Entry]:
    if config.linear_projection:
        return linear(site, width, width)
    return conv(site, width, width, 1)


def _projections(site: Site, width: int, context: int) -> Iterator[Entry]:
    yield from linear(site.at("to_q"), width, width, has_bias=False)
    yield from linear(site.at("to_k"), context, width, has_bias=False)
    yield from linear(site.at("to_v"), context, width, has_bias=False)
    yield from linear(site.at("to_out.0"), width, width)
