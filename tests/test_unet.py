import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recordings import assert_close, load

from sdjax.config import UNetConfig
from sdjax.errors import SdjaxError
from sdjax.models import UNet
from sdjax.models.layers import GroupNorm, guidance_embedding, sinusoidal_embedding
from sdjax.typing import Conditioning


def recorded(name):
    config, tree, data = load(f"models_{name}", UNetConfig)
    given = Conditioning(context=data["context"], vector=data.get("vector"))
    return config, tree, (data["x"], data["t"], given), data["out"]


@pytest.mark.parametrize("name", ["unet_sd1", "unet_sdxl"])
def test_recorded(name):
    config, variables, inputs, expected = recorded(name)
    assert_close(jax.jit(UNet(config).apply)(variables, *inputs), expected)


@pytest.mark.slow
def test_jit_is_eager_and_rows_are_independent():
    config, variables, inputs, _ = recorded("unet_sd1")
    out = UNet(config).apply(variables, *inputs)
    apply = jax.jit(UNet(config).apply)
    assert_close(apply(variables, *inputs), out, 1e-6)
    second = jax.tree.map(lambda x: x[1:], inputs)
    assert_close(apply(variables, *second), out[1:], 1e-6)


def test_bfloat16_is_near():
    config, variables, inputs, expected = recorded("unet_sd1")
    variables, inputs = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.bfloat16), (variables, inputs)
    )
    # The time stays float32: bfloat16 cannot tell 981 from 982.
    x, _, given = inputs
    t = jnp.asarray([981.0, 3.5])
    out = jax.jit(UNet(config, dtype=jnp.bfloat16).apply)(variables, x, t, given)
    assert out.dtype == jnp.bfloat16
    assert_close(out, expected, 0.05)


@pytest.mark.slow
def test_gradient_is_finite_and_reaches_every_parameter():
    config, variables, inputs, _ = recorded("unet_sdxl")
    loss = lambda v: jnp.square(UNet(config).apply(v, *inputs)).mean()
    for path, leaf in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(variables)):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


SMALL = UNetConfig(
    block_out_channels=(32, 32),
    layers_per_block=1,
    transformer_depth=(1, 0),
    num_heads=(2, 2),
    context_dim=12,
    cross_attention_only=(False, False),
)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def shape_of(config=SMALL, channels=4, **given):
    """Runs the U-Net on shapes alone."""
    given = {"context": floats(2, 5, 12)} | given
    key = jax.eval_shape(lambda: jax.random.key(0))
    run = lambda *inputs: UNet(config).init_with_output(*inputs)[0]
    inputs = floats(2, 6, 7, channels), floats(2), Conditioning(**given)
    return jax.eval_shape(run, key, *inputs).shape


def test_concat_and_residuals_fit():
    assert shape_of() == (2, 6, 7, 4)
    nine = dataclasses.replace(SMALL, in_channels=9)
    assert shape_of(nine, concat=floats(2, 6, 7, 5)) == (2, 6, 7, 4)
    assert shape_of(nine, channels=9) == (2, 6, 7, 4)
    down = floats(2, 3, 4, 32)
    residuals = (*[floats(2, 6, 7, 32)] * 2, *[down] * 3)
    assert shape_of(residuals=residuals) == (2, 6, 7, 4)


VECTOR = dataclasses.replace(SMALL, vector="class_projection", vector_dim=6)
LABELS = dataclasses.replace(SMALL, vector="class_embedding", vector_dim=6)
LCM = dataclasses.replace(SMALL, guidance_dim=8)
WRONG = {
    r"context is missing.*\[2, L, 12\]": dict(context=None),
    r"context has shape \[2, 5, 11\]": dict(context=floats(2, 5, 11)),
    r"context has shape \[3, 5, 12\]": dict(context=floats(3, 5, 12)),
    r"vector is missing.*\[2, 6\]": dict(config=VECTOR),
    r"vector has shape \[2, 7\]": dict(config=VECTOR, vector=floats(2, 7)),
    r"vector has shape \[2, 6\].*takes none": dict(vector=floats(2, 6)),
    r"vector is float32.*integer labels": dict(config=LABELS, vector=floats(2)),
    r"guidance is missing": dict(config=LCM),
    r"guidance has shape.*takes none": dict(guidance=floats(2, 8)),
    r"concat has shape.*takes none": dict(concat=floats(2, 6, 7, 5)),
    r"concat is missing.*\[2, 6, 7, 1\]": dict(channels=3),
    r"the latent has 5 channels": dict(channels=5),
    r"residuals has 1 arrays.*takes 5": dict(residuals=(floats(2, 6, 7, 32),)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_conditioning_says_so(message):
    with pytest.raises(SdjaxError, match=message):
        shape_of(**WRONG[message])


def test_sinusoidal_embedding_is_that_of_diffusers():
    e = sinusoidal_embedding(jnp.array([[981.0], [3.0]]), 320)
    assert e.shape == (2, 1, 320)
    at = [0, 1, 2, 159, 160, 161, 162, 319]
    expected = [0.679957, -0.798429, 0.578064, 0.994606]
    expected += [0.733252, 0.602089, 0.815991, 0.103726]
    # One unit in the last place of a frequency, at t = 981, is 6e-5.
    np.testing.assert_allclose(e[0, 0, np.array(at)], expected, atol=7e-5)
    angles = 3 * 10_000 ** (-np.arange(160) / 160)
    expected = np.concatenate([np.cos(angles), np.sin(angles)])
    np.testing.assert_allclose(e[1, 0], expected, atol=5e-7)


def test_guidance_embedding_is_that_of_diffusers():
    e = guidance_embedding(jnp.array([7.5]), 256)[0]
    expected = [-0.851236, 0.842131, -0.524783, 0.539273]
    at = np.array([0, 1, 128, 129])
    np.testing.assert_allclose(e[at], expected, atol=5e-4)


def test_group_norm_keeps_its_digits_far_from_zero():
    x = np.random.default_rng(0).normal(50, 0.5, (2, 40, 33, 8)).astype(np.float32)
    norm = GroupNorm(num_groups=4, epsilon=1e-5)
    ones, zeros = jnp.ones(8), jnp.zeros(8)
    out = norm.apply({"params": {"scale": ones, "bias": zeros}}, x)
    groups = x.astype(np.float64).reshape(2, -1, 4, 2)
    mean = groups.mean((1, 3), keepdims=True)
    expected = (groups - mean) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(out, expected.reshape(x.shape), atol=2e-5)
