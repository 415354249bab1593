"""The objective's arithmetic in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.config import ScheduleConfig
from sdjax.diffusion import add_noise, alpha_bars
from sdjax.diffusion.loss import distance, min_snr_weights, prediction_target

SD = alpha_bars(ScheduleConfig())
ZERO_SNR = alpha_bars(ScheduleConfig(rescale_betas_zero_snr=True))
RNG = np.random.default_rng(0)
X0, EPS = (RNG.standard_normal((2, 4, 4, 3), np.float32) for _ in range(2))


@pytest.mark.parametrize("t", [0, 500, 999])
def test_v_and_the_noisy_latent_give_back_both_parts(t):
    # A rotation: x0 = √ᾱ x_t − √(1 − ᾱ) v and ε = √(1 − ᾱ) x_t + √ᾱ v.
    times = jnp.full(2, t)
    x_t = add_noise(X0, EPS, times, SD)
    v = prediction_target(X0, EPS, times, SD, "v_prediction")
    signal, noise = np.sqrt(SD[t]), np.sqrt(1 - SD[t])
    np.testing.assert_allclose(signal * x_t - noise * v, X0, atol=2e-6)
    np.testing.assert_allclose(noise * x_t + signal * v, EPS, atol=2e-6)


def test_at_zero_snr_the_input_is_noise_and_v_is_the_picture():
    last = jnp.full(2, 999)
    np.testing.assert_array_equal(add_noise(X0, EPS, last, ZERO_SNR), EPS)
    v = prediction_target(X0, EPS, last, ZERO_SNR, "v_prediction")
    np.testing.assert_array_equal(v, -X0)


def test_targets_of_the_other_two():
    times = jnp.array([3, 900])
    assert prediction_target(X0, EPS, times, SD, "epsilon") is EPS
    assert prediction_target(X0, EPS, times, SD, "sample") is X0


def test_min_snr_weights():
    alpha_bar = np.array([0.9, 0.5, 0.2])  # snr 9, 1, 0.25
    weights = lambda kind: min_snr_weights(alpha_bar, kind, 5.0)
    np.testing.assert_allclose(weights("epsilon"), [5 / 9, 1, 1])
    np.testing.assert_allclose(weights("v_prediction"), [5 / 10, 1 / 2, 0.2])
    np.testing.assert_allclose(weights("sample"), [5, 1, 0.25])


def test_min_snr_weights_at_zero_snr():
    ends = {"epsilon": 1, "v_prediction": 0, "sample": 0}
    for kind, last in ends.items():
        weights = min_snr_weights(ZERO_SNR, kind, 5.0)
        assert np.isfinite(weights).all()
        assert weights[-1] == last


@settings(deadline=None, max_examples=50)
@given(st.floats(-1e3, 1e3, width=32), st.floats(1e-3, 10))
def test_distances_in_float64(d, c):
    prediction, target = jnp.full((1, 1, 1, 1), d, jnp.float32), jnp.zeros((1, 1, 1, 1))
    # √(d² + c²) − c where float64 has digits for the difference, else its series.
    d = float(jnp.float32(d))
    huber = np.hypot(d, c) - c if abs(d) > 1e-3 * c else d**2 / (2 * c)
    for kind, expected in {"l2": d**2, "l1": abs(d), "huber": huber}.items():
        got = distance(prediction, target, kind, c)
        np.testing.assert_allclose(got, [expected], rtol=2e-6, atol=1e-37)


def test_the_mean_is_of_each_sample_and_in_float32():
    prediction = jnp.asarray(X0, jnp.bfloat16)
    got = distance(prediction, jnp.asarray(EPS), "l2", 0.1)
    expected = np.square(np.float64(prediction) - EPS).mean(axis=(1, 2, 3))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)
