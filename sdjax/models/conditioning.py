"""What conditioning a U-Net takes, held against what it is given."""

import jax.numpy as jnp
from jaxtyping import Array

from sdjax.config import UNetConfig
from sdjax.errors import SdjaxError
from sdjax.typing import Conditioning


def takes_context(config: UNetConfig) -> bool:
    """Says whether the U-Net has any transformer."""
    has_any = any((*config.transformer_depth, config.mid_transformer_depth))
    return has_any and not config.plain_attention


def check_conditioning(config: UNetConfig, x: Array, given: Conditioning) -> None:
    """Checks shapes against `config` and the latent `x`; at trace time, so for free.

    Raises:
        SdjaxError: at the first part that is missing, unasked for or misshapen.
    """
    B, H, W, C = x.shape
    context = (B, "L", config.context_dim) if takes_context(config) else None
    _check("context", given.context, context)
    labels = config.vector == "class_embedding"
    vector = None
    if config.vector is not None:
        vector = (B,) if labels else (B, config.vector_dim)
    _check("vector", given.vector, vector)
    if labels and not jnp.issubdtype(jnp.result_type(given.vector), jnp.integer):
        raise SdjaxError(
            f"conditioning.vector is {jnp.result_type(given.vector)}, but this U-Net "
            "takes integer labels"
        )
    guidance = None if config.guidance_dim is None else (B, config.guidance_dim)
    _check("guidance", given.guidance, guidance)
    if C > config.in_channels:
        raise SdjaxError(
            f"the latent has {C} channels, but this U-Net takes {config.in_channels}"
        )
    extra = config.in_channels - C
    _check("concat", given.concat, (B, H, W, extra) if extra else None)


def check_residuals(given: Conditioning, skips: int) -> None:
    """Checks the number of residuals against that of the skip connections.

    Raises:
        SdjaxError: if there is not one per skip and one for the mid block.
    """
    count = len(given.residuals or ())
    if given.residuals is not None and count != skips + 1:
        raise SdjaxError(
            f"conditioning.residuals has {count} arrays, but this U-Net takes "
            f"{skips + 1}: one per skip connection and one for the mid block"
        )


def _check(
    name: str, array: Array | None, shape: tuple[int | str | None, ...] | None
) -> None:
    if shape is None:
        if array is not None:
            raise SdjaxError(
                f"conditioning.{name} has shape {list(array.shape)}, but this U-Net "
                "takes none"
            )
        return
    wanted = f"[{', '.join(map(str, shape))}]"
    if array is None:
        raise SdjaxError(
            f"conditioning.{name} is missing, but this U-Net needs it, of shape "
            f"{wanted}"
        )
    fits = len(shape) == array.ndim and all(
        isinstance(n, str) or n == m for n, m in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise SdjaxError(
            f"conditioning.{name} has shape {list(array.shape)}, but this U-Net takes "
            f"{wanted}"
        )
