"""What a model's config must keep to, so that no file can ask for endless work."""

from typing import Any

from sdjax.config import ModelConfig, UNetConfig
from sdjax.errors import SdjaxError
from sdjax.models.conditioning import takes_context

MAX_LEVELS = 12
MAX_LAYERS = 128
MAX_LAYERS_PER_BLOCK = 16
MAX_DEPTH = 64
MAX_ROWS = 2**20


def check_limits(config: ModelConfig, where: str) -> None:
    """Demands one value per level, and sizes that a network may have.

    Raises:
        SdjaxError: naming `where`, the field and its value.
    """
    unet, vae = config.unet, config.vae
    _check_context(config, where)
    for name, part, fields in (
        ("unet", unet, ("transformer_depth", "num_heads", "cross_attention_only")),
        ("vae", vae, ("attention_levels",)),
    ):
        levels = len(part.block_out_channels)
        _demand(where, f"number of levels of the {name}", levels, 1, MAX_LEVELS)
        for field in fields:
            value = getattr(part, field)
            if len(value) != levels:
                raise SdjaxError(
                    f"{where}: {name}.{field} is {value!r:.80}, not {levels} values"
                )
        for width in (*part.block_out_channels, part.in_channels, part.out_channels):
            _demand(where, f"a width of the {name}", width, 1, 2**16)
        layers = part.layers_per_block
        _demand(where, f"{name}.layers_per_block", layers, 1, MAX_LAYERS_PER_BLOCK)
    _check_attention(unet, where)
    if vae.codebook_size is not None:
        _demand(where, "vae.codebook_size", vae.codebook_size, 1, MAX_ROWS)
    if (unet.vector is None) != (unet.vector_dim is None):
        raise SdjaxError(f"{where}: unet.vector_dim is {unet.vector_dim}")
    for name, tower in config.text_encoders.items():
        _demand(where, f"{name}.num_layers", tower.num_layers, 1, MAX_LAYERS)
        _demand(where, f"{name}.width", tower.width, 1, 2**16)


def _check_attention(unet: UNetConfig, where: str) -> None:
    """Demands depths, and heads that divide the widths where they are packed so."""
    most = 1 if unet.plain_attention else MAX_DEPTH
    for depth in (*unet.transformer_depth, unet.mid_transformer_depth):
        _demand(where, "a depth of the unet's transformers", depth, 0, most)
    for heads, width in zip(unet.num_heads, unet.block_out_channels, strict=True):
        if unet.plain_attention and (heads == 0 or width % heads):
            raise SdjaxError(
                f"{where}: {heads} heads of the unet do not divide {width}"
            )


def _check_context(config: ModelConfig, where: str) -> None:
    """Demands what the U-Net's context comes from."""
    embedder = config.class_embedder
    if takes_context(config.unet) and not config.text_encoders and embedder is None:
        raise SdjaxError(f"{where} has no text encoder")
    if embedder is None:
        return
    _demand(where, "class_embedder.num_classes", embedder.num_classes, 1, MAX_ROWS)
    if config.text_encoders or embedder.width != config.unet.context_dim:
        raise SdjaxError(
            f"{where}: class_embedder.width is {embedder.width}; it must be the "
            f"context's {config.unet.context_dim}, with no text encoder beside it"
        )


def _demand(where: str, what: str, value: Any, least: int, most: int) -> None:
    if not least <= value <= most:
        raise SdjaxError(f"{where}: {what} is {value!r:.40}, not {least} to {most}")
