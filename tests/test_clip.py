import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recordings import assert_close, load

from sdjax.config import TextEncoderConfig
from sdjax.errors import SdjaxError
from sdjax.models import CLIPTextEncoder


@pytest.fixture(scope="module")
def recorded():
    return load("models_clip", TextEncoderConfig)


def encode(config, variables, tokens, dtype=jnp.float32, **options):
    apply = jax.jit(CLIPTextEncoder(config, dtype).apply, static_argnames="clip_skip")
    return apply(variables, tokens, **options)


def test_recorded(recorded):
    config, variables, data = recorded
    out = encode(config, variables, data["tokens"])
    assert_close(out.states, data["states"])
    assert_close(out.pooled, data["pooled"])
    eager = CLIPTextEncoder(config).apply(variables, data["tokens"])
    assert_close(eager.states, out.states, 1e-6)


def test_bfloat16_is_near(recorded):
    config, variables, data = recorded
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), variables)
    out = encode(config, variables, data["tokens"], jnp.bfloat16)
    assert out.states.dtype == out.pooled.dtype == jnp.bfloat16
    assert_close(out.states, data["states"], 0.05)
    assert_close(out.pooled, data["pooled"], 0.05)


def test_it_is_causal_and_rows_are_independent(recorded):
    config, variables, data = recorded
    tokens = data["tokens"].copy()
    tokens[0, 12:] = 5
    out = encode(config, variables, tokens)
    assert_close(out.states[0, :12], data["states"][0, :12], 1e-6)
    assert np.abs(out.states[0, 12:] - data["states"][0, 12:]).max() > 0.1
    assert_close(out.states[1], data["states"][1], 1e-6)
    # The pooled output reads the first end-of-text, at position 7 of row 0.
    assert_close(out.pooled, data["pooled"], 1e-6)
    shorter = encode(config, variables, data["tokens"][:1, :9])
    assert_close(shorter.states, data["states"][:1, :9], 2e-6)


def test_clip_skip_and_states_count_layers_alike(recorded):
    config, variables, data = recorded
    last = dataclasses.replace(config, states="last")
    out = encode(last, variables, data["tokens"], clip_skip=1)
    assert_close(out.states, data["states"])
    assert_close(out.pooled, data["pooled"])
    normed = dataclasses.replace(last, final_norm=True)
    states = np.asarray(encode(normed, variables, data["tokens"]).states, np.float64)
    norm = variables["params"]["final_layer_norm"]
    states = (states - norm["bias"]) / norm["scale"]
    np.testing.assert_allclose(states.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(states.std(-1), 1, atol=1e-3)


def test_the_old_rule_takes_the_largest_id(recorded):
    config, variables, data = recorded
    tokens = data["tokens"].copy()
    tokens[:, 3] = 62  # the largest id but for the end
    old = dataclasses.replace(config, eos_token_id=2)
    assert_close(
        encode(old, variables, tokens).pooled,
        encode(config, variables, tokens).pooled,
        1e-6,
    )


@pytest.mark.parametrize("clip_skip", [-1, 2, 5])
def test_impossible_clip_skip(recorded, clip_skip):
    config, variables, data = recorded
    with pytest.raises(SdjaxError, match=f"clip_skip={clip_skip} must be"):
        encode(config, variables, data["tokens"], clip_skip=clip_skip)


def test_too_many_tokens(recorded):
    config, variables, _ = recorded
    with pytest.raises(SdjaxError, match=r"length 78.*at most 77"):
        encode(config, variables, np.zeros((1, 78), np.int32))
