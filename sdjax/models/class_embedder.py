"""Classes as context: one token of cross-attention per label.

Rombach et al. 2022, table 17 and its repository's ClassEmbedder, arXiv:2112.10752.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from sdjax.config import ClassEmbedderConfig
from sdjax.typing import Context


class ClassEmbedder(nn.Module):
    """A table with a row for each class."""

    config: ClassEmbedderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, labels: Int[Array, " b"]) -> Context:
        """Maps labels in [0, num_classes) to `Conditioning.context` [B, 1, D]."""
        config = self.config
        table = nn.Embed(
            config.num_classes, config.width, dtype=self.dtype, name="embedding"
        )
        return table(labels)[:, None, :]  # [B, 1, D]
