"""Guidance and preconditioning against their equations in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion import guide, make_denoiser
from sdjax.errors import SdjaxError
from sdjax.typing import Conditioning, Level

rng = np.random.default_rng(0)
X = rng.normal(size=(3, 4, 5, 2)).astype(np.float32)
PROMPT = Conditioning(
    context=rng.normal(size=(3, 2, 2)).astype(np.float32),
    vector=rng.normal(size=(3, 2)).astype(np.float32),
)
NONE = jax.tree.map(lambda v: v * 0.1 - 0.3, PROMPT)
T = np.array([1.0, 2.0, 3.0], np.float32)


def network(x, t, conditioning):
    gain = conditioning.context.sum(1) + conditioning.vector  # [B, C]
    return jnp.sin(x * gain[:, None, None] + t[:, None, None, None])


def expected(scale, phi):
    without, given = (np.asarray(network(X, T, c), np.float64) for c in (NONE, PROMPT))
    scale, phi = (np.reshape(v, (-1, 1, 1, 1)) for v in (scale, phi))
    result = without + scale * (given - without)
    # As diffusers, with the unbiased deviation, which is the same ratio.
    deviations = [v.std((1, 2, 3), ddof=1, keepdims=True) for v in (given, result)]
    return phi * result * deviations[0] / deviations[1] + (1 - phi) * result


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, [1.0, 3.0, 9.0]])
@pytest.mark.parametrize("phi", [0.0, 0.7, [0.0, 0.5, 1.0]])
def test_guidance_is_its_equation(scale, phi):
    @jax.jit
    def guided(scale, phi):
        return guide(network, NONE, scale, phi)(X, T, PROMPT)

    result = guided(jnp.array(scale), jnp.array(phi))
    np.testing.assert_allclose(result, expected(scale, phi), rtol=2e-5, atol=2e-6)


def test_scale_one_is_the_conditional_prediction():
    result = guide(network, NONE, 1.0)(X, T, PROMPT)
    np.testing.assert_allclose(result, network(X, T, PROMPT), atol=2e-7)


def test_the_network_is_called_once_unconditional_half_first():
    calls = []

    def spy(x, t, conditioning):
        calls.append((x.shape, t, conditioning))
        return x

    guide(spy, NONE, 5.0)(X, T, PROMPT)
    ((shape, t, conditioning),) = calls
    assert shape == (6, 4, 5, 2)
    np.testing.assert_array_equal(t, np.tile(T, 2))
    np.testing.assert_array_equal(conditioning.context[:3], NONE.context)
    np.testing.assert_array_equal(conditioning.vector[3:], PROMPT.vector)


def test_a_flat_prediction_is_no_division_by_zero():
    flat = lambda x, t, conditioning: jnp.zeros_like(x)
    slope = jax.grad(lambda x: guide(flat, NONE, 7.5, 0.7)(x, T, PROMPT).sum())(X)
    assert np.all(np.isfinite(slope))


def test_conditioning_on_one_side_only_is_named():
    with pytest.raises(SdjaxError, match=r"conditioning\.vector must be given"):
        guide(network, NONE._replace(vector=None), 5.0)(X, T, PROMPT)


def test_denoiser_is_its_equation():
    level = Level(t=7.0, c_in=0.5, c_skip=2.0, c_out=-3.0)
    half = lambda x, t, conditioning: network(x, t, conditioning).astype(jnp.bfloat16)
    x0 = make_denoiser(half, PROMPT)(X, level)
    output = half(0.5 * X, np.full(3, 7.0, np.float32), PROMPT).astype(jnp.float32)
    assert x0.dtype == jnp.float32
    np.testing.assert_allclose(x0, 2 * X - 3 * output, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clip", [0.4, np.float32(0.4)])
def test_denoiser_clips(clip):
    level = Level(t=7.0, c_in=1.0, c_skip=1.0, c_out=-1.0)
    free = make_denoiser(network, PROMPT)(X, level)
    clipped = make_denoiser(network, PROMPT, clip=clip)(X, level)
    np.testing.assert_array_equal(clipped, np.clip(free, -0.4, 0.4))
    unlimited = make_denoiser(network, PROMPT, clip=np.float32(np.inf))(X, level)
    np.testing.assert_array_equal(unlimited, free)
