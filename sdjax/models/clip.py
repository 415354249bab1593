"""The text towers of CLIP and OpenCLIP: a causal transformer over token ids.

Radford et al. 2021, section 2.4, arXiv:2103.00020.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sdjax.config import TextEncoderConfig
from sdjax.errors import SdjaxError
from sdjax.models.attention import attention
from sdjax.typing import Context, Tokens


class TextStates(NamedTuple):
    """What a text tower gives.

    Attributes:
        states: one vector per token, for cross-attention, [B, L, D].
        pooled: one vector per prompt, [B, E]: the last layer at the end-of-text
            token, projected where the tower has a projection.
    """

    states: Context
    pooled: Float[Array, "b e"]


class CLIPTextEncoder(nn.Module):
    """A CLIP (quick GELU) or OpenCLIP (GELU) text tower."""

    config: TextEncoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens, *, clip_skip: int = 0) -> TextStates:
        """Encodes token ids [B, L] with L at most `max_length`.

        `clip_skip` is static: how many layers more than `config.states` to leave out
        of the states; the pooled vector always comes from the last layer.

        Raises:
            SdjaxError: if `tokens` is too long, or `clip_skip` leaves no layer.
        """
        config = self.config
        used = config.num_layers - (config.states == "penultimate") - clip_skip
        if clip_skip < 0 or used < 1:
            raise SdjaxError(
                f"clip_skip={clip_skip} must be at least 0 and leave a layer of the "
                f"text tower's {config.num_layers}"
            )
        x = Embeddings(config, self.dtype, name="embeddings")(tokens)
        layers = Layers(config, self.dtype, name="encoder")(x)
        norm = _layer_norm(config, "final_layer_norm", self.dtype)
        states = norm(layers[used - 1]) if config.final_norm else layers[used - 1]

        rows = jnp.arange(tokens.shape[0])
        pooled = norm(layers[-1])[rows, _end_of_text(tokens, config.eos_token_id)]
        if config.projection_dim is not None:
            pooled = nn.Dense(
                config.projection_dim,
                use_bias=False,
                dtype=self.dtype,
                name="text_projection",
            )(pooled)
        return TextStates(states, pooled)


class Embeddings(nn.Module):
    """Token plus position embedding."""

    config: TextEncoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Tokens) -> Context:
        """Maps ids [B, L] to vectors [B, L, D]."""
        config, (_, L) = self.config, tokens.shape
        if L > config.max_length:
            raise SdjaxError(
                f"tokens have length {L}, but the text tower takes at most "
                f"{config.max_length}"
            )
        token_embedding = nn.Embed(
            config.vocab_size, config.width, dtype=self.dtype, name="token_embedding"
        )
        position_embedding = nn.Embed(
            config.max_length, config.width, dtype=self.dtype, name="position_embedding"
        )
        return token_embedding(tokens) + position_embedding(jnp.arange(L))[None]


class Layers(nn.Module):
    """The stack of layers."""

    config: TextEncoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Context) -> list[Context]:
        """Gives the output of every layer; XLA drops those that nobody reads."""
        outputs = []
        for i in range(self.config.num_layers):
            x = Layer(self.config, self.dtype, name=f"layers_{i}")(x)
            outputs.append(x)
        return outputs


class Layer(nn.Module):
    """Causal self-attention and MLP, each pre-norm and residual."""

    config: TextEncoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Context) -> Context:
        """Maps [B, L, D] to itself."""
        h = _layer_norm(self.config, "layer_norm1", self.dtype)(x)
        x = x + SelfAttention(self.config.num_heads, self.dtype, name="self_attn")(h)
        h = _layer_norm(self.config, "layer_norm2", self.dtype)(x)
        return x + MLP(self.config, self.dtype, name="mlp")(h)


class SelfAttention(nn.Module):
    """Causal multi-head attention, every projection with bias."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Context) -> Context:
        """Lets token i see tokens 0…i. Padding is not masked, as in training."""
        B, L, D = x.shape
        q, k, v = (
            nn.Dense(D, dtype=self.dtype, name=f"{name}_proj")(x).reshape(
                B, L, self.num_heads, D // self.num_heads
            )  # [B, L, N, K]
            for name in "qkv"
        )
        h = attention(q, k, v, causal=True).reshape(B, L, D)  # [B, L, D]
        return nn.Dense(D, dtype=self.dtype, name="out_proj")(h)


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    config: TextEncoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Context) -> Context:
        """Maps [B, L, D] to itself."""
        h = nn.Dense(self.config.mlp_dim, dtype=self.dtype, name="fc1")(x)
        if self.config.activation == "quick_gelu":
            h = h * nn.sigmoid(1.702 * h)
        else:
            h = nn.gelu(h, approximate=False)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


def _layer_norm(config: TextEncoderConfig, name: str, dtype: DTypeLike) -> nn.LayerNorm:
    return nn.LayerNorm(
        config.layer_norm_eps, dtype, use_fast_variance=False, name=name
    )


def _end_of_text(tokens: Tokens, eos_token_id: int) -> Int[Array, " b"]:
    # Configurations written before transformers knew the real id say 2.
    if eos_token_id == 2:
        return jnp.argmax(tokens, axis=-1)
    return jnp.argmax(tokens == eos_token_id, axis=-1)
