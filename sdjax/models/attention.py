"""Attention, plain and in query chunks, and the blocks that mix positions with it.

softmax(scale · q kᵀ) v, Vaswani et al. 2017, eq. 1, arXiv:1706.03762; softmax in
float32. The chunked form computes the same rows a few at a time, as in Rabe & Staats
2021, arXiv:2112.05682, without their split over keys.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.models.layers import GroupNorm
from sdjax.typing import Context

Queries = Float[Array, "b l n k"]
Keys = Float[Array, "b s n k"]

SCORE_BYTES = 32 * 2**20
"""Largest float32 score matrix held at once: it stays in a CPU's last cache, and in
the 128 MiB of a TPU core's vector memory, which is 7 times faster than spilling it."""
GPU_SCORE_BYTES = 256 * 2**20
"""The same on a GPU, which has no such memory and needs more work in each step."""


def attention(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Queries:
    """Attends from `q` to `k` and `v`, plain or chunked by shapes and platform alone.

    `scale` is by default head_size^−0.5. With `causal`, row i sees keys 0…i.
    """

    def within(score_bytes: int) -> Callable[[Array, Array, Array], Array]:
        batch, rows = chunk_size(q.shape, k.shape[1], score_bytes)
        if (batch, rows) == q.shape[:2]:
            return partial(plain_attention, scale=scale, causal=causal)
        return partial(
            chunked_attention, batch=batch, rows=rows, scale=scale, causal=causal
        )

    if chunk_size(q.shape, k.shape[1], SCORE_BYTES) == q.shape[:2]:
        return plain_attention(q, k, v, scale=scale, causal=causal)
    gpu = within(GPU_SCORE_BYTES)
    return jax.lax.platform_dependent(
        q, k, v, cuda=gpu, rocm=gpu, default=within(SCORE_BYTES)
    )


def chunk_size(shape: tuple[int, ...], keys: int, score_bytes: int) -> tuple[int, int]:
    """Gives the batch and the rows of a chunk, for queries [B, L, N, K].

    As many whole batch elements as fit in `score_bytes`; where not one does, rows of
    one, a power of two of them.
    """
    B, L, N, _ = shape
    rows = score_bytes // (4 * N * keys)
    if rows >= L:
        return max(b for b in range(1, B + 1) if B % b == 0 and b * L <= rows), L
    return 1, 1 << max(rows.bit_length() - 1, 0)


def plain_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Queries:
    """Attends with the whole score matrix in memory."""
    return _attend(q, k, v, jnp.arange(q.shape[1]) if causal else None, scale)


def chunked_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    batch: int,
    rows: int,
    scale: float | None = None,
    causal: bool = False,
) -> Queries:
    """Attends with the scores of `rows` queries in memory, also backwards.

    `batch` elements, a divisor of B, are worked on at a time.
    """
    B = q.shape[0]
    whole = jax.checkpoint(partial(plain_attention, scale=scale, causal=causal))
    by_rows = partial(_attend_by_rows, rows=rows, scale=scale, causal=causal)
    attend = whole if rows >= q.shape[1] else by_rows
    if batch == B:
        return attend(q, k, v)
    # Strided: a batch that jit has sharded stays so, if `batch` covers the devices.
    split = lambda x: x.reshape(batch, B // batch, *x.shape[1:]).swapaxes(0, 1)
    out = jax.lax.map(lambda qkv: attend(*qkv), (split(q), split(k), split(v)))
    return out.swapaxes(0, 1).reshape(q.shape)  # [B, L, N, K]


def _attend_by_rows(
    q: Array, k: Array, v: Array, *, rows: int, scale: float | None, causal: bool
) -> Array:
    B, L, N, K = q.shape
    count = -(-L // rows)
    padded = jnp.pad(q, ((0, 0), (0, count * rows - L), (0, 0), (0, 0)))
    chunks = padded.reshape(B, count, rows, N, K).swapaxes(0, 1)
    # [count, B, rows, N, K]
    positions = jnp.arange(count * rows).reshape(count, rows)

    @jax.checkpoint
    def attend(chunk: tuple[Array, Array]) -> Array:
        q, positions = chunk
        return _attend(q, k, v, positions if causal else None, scale)

    out = jax.lax.map(attend, (chunks, positions)).swapaxes(0, 1)
    return out.reshape(B, count * rows, N, K)[:, :L]  # [B, L, N, K]


def _attend(
    q: Array, k: Array, v: Array, positions: Array | None, scale: float | None
) -> Array:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bqnk,bsnk->bnqs", q, k, preferred_element_type=jnp.float32)
    scores = factor * scores
    if positions is not None:
        seen = positions[:, None] >= jnp.arange(k.shape[1])[None, :]
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnqs,bsnk->bqnk", weights, v)


class Attention(nn.Module):
    """Multi-head attention; without bias in the projections, with one in the output."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Context, context: Context) -> Context:
        """Attends from `x` to `context`, which is `x` in self-attention."""
        B, L, D = x.shape

        def project(name: str, x: Array) -> Array:
            h = nn.Dense(D, use_bias=False, dtype=self.dtype, name=name)(x)
            return h.reshape(B, -1, self.num_heads, D // self.num_heads)  # [B, L, N, K]

        q, k, v = project("to_q", x), project("to_k", context), project("to_v", context)
        h = attention(q, k, v).reshape(B, L, D)  # [B, L, D]
        return nn.Dense(D, dtype=self.dtype, name="to_out_0")(h)


class GEGLU(nn.Module):
    """value · gelu(gate), exact GELU. Shazeer 2020, arXiv:2002.05202."""

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Context) -> Context:
        """Maps [B, L, D] to [B, L, width]."""
        h = nn.Dense(2 * self.width, dtype=self.dtype, name="proj")(x)
        value, gate = jnp.split(h, 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Context) -> Context:
        """Maps [B, L, D] to itself."""
        D = x.shape[-1]
        h = GEGLU(4 * D, self.dtype, name="net_0")(x)
        return nn.Dense(D, dtype=self.dtype, name="net_2")(h)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed forward, each pre-norm and residual."""

    num_heads: int
    cross_attention_only: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Context, context: Context) -> Context:
        """Maps tokens [B, H·W, C]; with `cross_attention_only` both attend outward."""

        def norm(name: str, x: Array) -> Array:
            return nn.LayerNorm(1e-5, self.dtype, use_fast_variance=False, name=name)(x)

        h = norm("norm1", x)
        source = context if self.cross_attention_only else h
        x = x + Attention(self.num_heads, self.dtype, name="attn1")(h, source)
        h = norm("norm2", x)
        x = x + Attention(self.num_heads, self.dtype, name="attn2")(h, context)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3", x))


class Transformer2D(nn.Module):
    """Transformer blocks over the H·W positions, around a residual.

    Rombach et al. 2022 (latent diffusion), appendix E.2.1, arXiv:2112.10752.
    """

    depth: int
    num_heads: int
    num_groups: int
    linear_projection: bool = False
    cross_attention_only: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Context
    ) -> Float[Array, "b h w c"]:
        """Mixes positions with each other and with `context`."""
        B, H, W, C = x.shape

        def project(name: str, h: Array) -> Array:
            # A 1×1 convolution is the same product; only its kernel is stored 4-D.
            if self.linear_projection:
                return nn.Dense(C, dtype=self.dtype, name=name)(h)
            return nn.Conv(C, (1, 1), dtype=self.dtype, name=name)(h)

        h = project(
            "proj_in", GroupNorm(self.num_groups, 1e-6, self.dtype, name="norm")(x)
        )
        h = h.reshape(B, H * W, C)  # [B, H*W, C]
        for i in range(self.depth):
            h = TransformerBlock(
                self.num_heads,
                self.cross_attention_only,
                self.dtype,
                name=f"transformer_blocks_{i}",
            )(h, context)
        return x + project("proj_out", h.reshape(B, H, W, C))  # [B, H, W, C]


class SpatialAttention(nn.Module):
    """Self-attention over the H·W positions, biases in all projections, residual.

    One head in the autoencoder; several in the U-Net of an unconditional model.
    """

    num_groups: int
    epsilon: float
    num_heads: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Mixes the H·W positions."""
        B, H, W, C = x.shape
        N = self.num_heads
        h = GroupNorm(self.num_groups, self.epsilon, self.dtype, name="group_norm")(x)
        h = h.reshape(B, H * W, C)  # [B, H*W, C]

        def project(name: str) -> Array:
            heads = nn.Dense(C, dtype=self.dtype, name=name)(h)
            return heads.reshape(B, H * W, N, C // N)  # [B, H*W, N, K]

        h = attention(project("to_q"), project("to_k"), project("to_v"))
        h = h.reshape(B, H * W, C)  # [B, H*W, C]
        h = nn.Dense(C, dtype=self.dtype, name="to_out_0")(h)
        return x + h.reshape(B, H, W, C)  # [B, H, W, C]
