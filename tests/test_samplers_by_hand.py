"""Samplers that diffusers lacks, against the recurrences of k-diffusion written out.

On a scalar toy network, in float64, with every noise 0.5 as in the golden table.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import ScheduleConfig
from sdjax.diffusion import make_denoiser, sample, tableau
from sdjax.diffusion.schedule import alpha_bars, noise_levels
from sdjax.typing import Conditioning

SCHEDULE = ScheduleConfig(timestep_spacing="linspace")
LEVELS = noise_levels(alpha_bars(SCHEDULE))
NOISE = 0.5


def denoised(x, sigma):
    """ε = 0.6·x_in + 0.1·cos(t/100), as x0."""
    t = np.interp(math.log(sigma), np.log(LEVELS), np.arange(1000))
    eps = 0.6 * x / math.hypot(sigma, 1) + 0.1 * math.cos(t / 100)
    return x - sigma * eps


def dpmpp_2s_a(x, sigmas, eta):
    for sigma, after in itertools.pairwise(sigmas):
        up = min(after, eta * math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
        down = math.sqrt(after**2 - up**2)
        d = denoised(x, sigma)
        if down == 0:
            x = d
        else:
            middle = math.sqrt(sigma * down)
            x2 = middle / sigma * x + (1 - middle / sigma) * d
            x = down / sigma * x + (1 - down / sigma) * denoised(x2, middle)
        x += NOISE * up
    return x


def dpmpp_3m_sde(x, sigmas, eta):
    h1 = h2 = d1 = d2 = None
    for sigma, after in itertools.pairwise(sigmas):
        d = denoised(x, sigma)
        if after == 0:
            return d
        h = math.log(sigma / after)
        big = h * (1 + eta)
        x = math.exp(-big) * x - math.expm1(-big) * d
        phi2 = math.expm1(-big) / big + 1
        phi3 = phi2 / big - 0.5
        if h2 is not None:
            r0, r1 = h1 / h, h2 / h
            first, second = (d - d1) / r0, (d1 - d2) / r1
            slope = first + (first - second) * r0 / (r0 + r1)
            x += phi2 * slope - phi3 * (first - second) / (r0 + r1)
        elif h1 is not None:
            x += phi2 * (d - d1) / (h1 / h)
        x += after * math.sqrt(-math.expm1(-2 * h * eta)) * NOISE
        d1, d2, h1, h2 = d, d1, h, h1
    return x


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25])
@pytest.mark.parametrize("by_hand", [dpmpp_2s_a, dpmpp_3m_sde])
def test_recurrence(by_hand, steps, eta):
    times = np.linspace(999, 0, steps) if steps > 1 else np.array([0.0])
    sigmas = [*np.interp(times, np.arange(1000), LEVELS), 0.0]
    want = by_hand(sigmas[0], sigmas, eta)

    def network(x, t, conditioning):
        return 0.6 * x + 0.1 * jnp.cos(t / 100)[:, None, None, None]

    table = tableau(SCHEDULE, by_hand.__name__, steps, eta=eta)
    noise = lambda row: jnp.full((1, 1, 1, 1), NOISE)
    run = jax.jit(
        lambda x, table: sample(make_denoiser(network, Conditioning()), x, table, noise)
    )
    got = run(jnp.ones((1, 1, 1, 1)), table)
    np.testing.assert_allclose(got.item(), want, rtol=1e-5)
