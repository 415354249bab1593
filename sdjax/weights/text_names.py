"""Names of a text tower's leaves, in transformers (CLIP) and in OpenCLIP.

OpenCLIP packs q, k and v in one matrix, and its text_projection is [in, out].
"""

from collections.abc import Iterator
from typing import Literal

from sdjax.config import TextEncoderConfig
from sdjax.weights.entries import ROOT, Entry, Form, Site, linear, norm

TextLayout = Literal["clip", "open_clip"]
PREFIX = "text_model."
"""Published files carry it before every key but the projection's."""


def text_entries(config: TextEncoderConfig, layout: TextLayout) -> Iterator[Entry]:
    """Every leaf of the tower; `layout` decides its names in a single file."""
    width, is_open = config.width, layout == "open_clip"
    prefix = "" if is_open else PREFIX

    def site(key: str, original: str) -> Site:
        return ROOT.at(key, original if is_open else prefix + key)

    token = site("embeddings.token_embedding", "token_embedding")
    shape = (config.vocab_size, width)
    yield Entry(f"{token.key}weight", f"{token.original}weight", shape, "embedding")
    position = "embeddings.position_embedding.weight"
    original = "positional_embedding" if is_open else prefix + position
    yield Entry(position, original, (config.max_length, width), "embedding")
    for index in range(config.num_layers):
        place = site(f"encoder.layers.{index}", f"transformer.resblocks.{index}")
        yield from _layer(config, place, is_open)
    yield from norm(site("final_layer_norm", "ln_final"), width)
    if config.projection_dim is not None:
        shape = (config.projection_dim, width)
        key = "text_projection.weight"
        names = (key, "text_projection") if is_open else (key, key)
        form: Form = "transposed" if is_open else "same"
        yield Entry(*names, shape, "linear", form)


def _layer(config: TextEncoderConfig, site: Site, is_open: bool) -> Iterator[Entry]:
    width = config.width

    def at(key: str, original: str) -> Site:
        return site.at(key, original if is_open else key)

    yield from norm(at("layer_norm1", "ln_1"), width)
    attention = at("self_attn", "attn")
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        place = attention.at(name)
        if is_open:
            yield from _packed(place.key, attention.original, width, part)
        else:
            yield from linear(place, width, width)
    yield from linear(attention.at("out_proj"), width, width)
    yield from norm(at("layer_norm2", "ln_2"), width)
    yield from linear(at("mlp.fc1", "mlp.c_fc"), width, config.mlp_dim)
    yield from linear(at("mlp.fc2", "mlp.c_proj"), config.mlp_dim, width)


def _packed(key: str, original: str, width: int, part: int) -> Iterator[Entry]:
    weight, bias = f"{original}in_proj_weight", f"{original}in_proj_bias"
    yield Entry(f"{key}weight", weight, (width, width), "linear", "packed", part)
    yield Entry(f"{key}bias", bias, (width,), "bias", "packed", part)
