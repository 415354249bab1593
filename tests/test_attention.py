import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recordings import assert_close

from sdjax.models.attention import (
    attention,
    chunk_size,
    chunked_attention,
    plain_attention,
)


def draw(length, keys, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(2, n, 3, 8) for n in (length, keys, keys)]
    return [jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in shapes]


def by_hand(q, k, v, causal=False):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, i, n in np.ndindex(q.shape[:3]):
        seen = i + 1 if causal else k.shape[1]
        weights = np.exp(k[b, :seen, n] @ q[b, i, n] / np.sqrt(q.shape[3]))
        out[b, i, n] = weights @ v[b, :seen, n] / weights.sum()
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [None, (2, 5), (1, 8), (1, 24)])
def test_both_forms_give_the_definition(chunk, causal):
    q, k, v = draw(24, 24)
    if chunk is None:
        out = plain_attention(q, k, v, causal=causal)
    else:
        batch, rows = chunk
        out = chunked_attention(q, k, v, batch=batch, rows=rows, causal=causal)
    assert_close(out, by_hand(q, k, v, causal), 1e-6)


def test_chunked_gradient_is_plain():
    q, k, v = draw(20, 7)
    loss = lambda form: lambda *qkv: jnp.sum(jnp.sin(form(*qkv)))
    chunked = functools.partial(chunked_attention, batch=1, rows=6)
    ours = jax.jit(jax.grad(loss(chunked), (0, 1, 2)))(q, k, v)
    theirs = jax.jit(jax.grad(loss(plain_attention), (0, 1, 2)))(q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-6)


def test_scale_and_low_precision():
    q, k, v = draw(9, 4)
    assert_close(
        attention(q, k, v, scale=0.5),
        by_hand(q * np.float32(0.5 * np.sqrt(8)), k, v),
        1e-6,
    )
    out = attention(*draw(9, 4, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert_close(out, by_hand(q, k, v), 0.02)


def test_the_choice_between_the_forms():
    """Small ones are plain; large ones hold no whole score matrix, on any platform."""
    whole = lambda shape: (
        "while"
        not in jax.jit(attention)
        .lower(*[jax.ShapeDtypeStruct(shape, jnp.float32)] * 3)
        .as_text()
    )
    assert whole((2, 77, 12, 64))
    assert whole((2, 256, 8, 160))
    assert not whole((2, 4096, 8, 40))


def test_the_large_form_under_transformations(monkeypatch):
    monkeypatch.setattr("sdjax.models.attention.SCORE_BYTES", 2**14)
    q, k, v = draw(200, 50)
    expected = plain_attention(q, k, v)
    assert_close(attention(q, k, v), expected, 1e-6)
    assert_close(jax.jit(attention)(q, k, v), expected, 1e-6)
    rows = jax.vmap(lambda *row: attention(*(x[None] for x in row))[0])
    assert_close(rows(q, k, v), expected, 1e-6)
    per_device = jax.pmap(attention)(*(x[:, None] for x in (q, k, v)))
    assert_close(per_device[:, 0], expected, 1e-6)


@pytest.mark.parametrize("length", [1, 63, 77, 1000, 4096, 16384])
@pytest.mark.parametrize("score_bytes", [2**20, 2**25, 2**28])
def test_chunk_size(length, score_bytes):
    for whole, keys in ((1, 77), (2, 4096), (6, 4096), (128, 4096)):
        batch, rows = chunk_size((whole, length, 8, 64), keys, score_bytes)
        assert whole % batch == 0 and 1 <= rows <= length
        assert 4 * batch * 8 * keys * rows <= score_bytes
        if rows < length:  # no room for twice as many
            assert batch == 1 and 4 * 8 * keys * 2 * rows > score_bytes


def test_a_score_row_past_the_budget_is_held_alone():
    assert chunk_size((3, 10, 8, 64), 4096, 100) == (1, 1)
