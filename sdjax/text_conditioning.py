"""From token ids to what a U-Net is conditioned on; for sampling and for training."""

from typing import cast

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.config import ModelConfig
from sdjax.models import CLIPTextEncoder, TextStates
from sdjax.models.layers import sinusoidal_embedding
from sdjax.typing import Context, Params, Tokens

SIZE_EMBEDDING_DIM = 256


def encode_tokens(
    params: Params,
    tokens: dict[str, Tokens],
    model: ModelConfig,
    *,
    dtype: DTypeLike,
    clip_skip: int = 0,
) -> tuple[Context, Float[Array, "b e"]]:
    """States of all text towers side by side, and the last tower's pooled output.

    Args:
        params: the model's, by component.
        tokens: ids [B, L] per text tower, by component name.
        model: has at least one text tower.
        dtype: of the computation and of the result.
        clip_skip: text layers to leave out beyond the model's own choice.
    """
    towers: list[TextStates] = []
    for name, tower in model.text_encoders.items():
        encoder = CLIPTextEncoder(tower, dtype=jnp.dtype(dtype))
        variables = {"params": params[name]}
        out = encoder.apply(variables, tokens[name], clip_skip=clip_skip)
        towers.append(cast(TextStates, out))
    states = jnp.concatenate([tower.states for tower in towers], axis=-1)
    return states, towers[-1].pooled


def size_vector(
    pooled: Float[Array, "b e"], size: Float[Array, "b n"]
) -> Float[Array, "b v"]:
    """SDXL's vector: the pooled text, then each size embedded in 256 numbers.

    Podell et al. 2023, section 2.2, arXiv:2307.01952; sizes are pixels.
    """
    embedded = sinusoidal_embedding(size.reshape(-1), SIZE_EMBEDDING_DIM)
    embedded = embedded.reshape(size.shape[0], -1)  # [B, n * 256]
    return jnp.concatenate([pooled.astype(jnp.float32), embedded], axis=-1)
