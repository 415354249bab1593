"""The golden table of samplers: a scalar "network" run through diffusers 0.42.1.

The network is 0.6·x_in + 0.1·cos(t/100), the start 1 × init_noise_sigma, every noise
0.5. Recorded: the calls, and the state after calls 1, 2, 3 and the last, in the
scheduler's own units ("ve": x/α).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import ScheduleConfig
from sdjax.diffusion import samplers_lambda, samplers_sigma, samplers_time
from sdjax.diffusion.denoiser import make_denoiser
from sdjax.diffusion.edm import edm_grid, edm_precondition
from sdjax.diffusion.grid import lambda_grid, time_grid
from sdjax.diffusion.loop import given_noise, sample
from sdjax.diffusion.samplers import tableau
from sdjax.diffusion.table import MIN_ROWS, Tableau, assemble
from sdjax.typing import Conditioning

LEADING = ScheduleConfig(
    timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False
)
LINSPACE = dataclasses.replace(LEADING, timestep_spacing="linspace")
TRAILING = dataclasses.replace(
    LEADING, timestep_spacing="trailing", set_alpha_to_one=True
)
LINSPACE_V = dataclasses.replace(LINSPACE, prediction_type="v_prediction")
ZERO_SNR_V = dataclasses.replace(
    TRAILING, prediction_type="v_prediction", rescale_betas_zero_snr=True
)

NAMED = {
    "ddim": (LEADING, "vp", 10, 1.298881, 1.554036, 1.745891, 1.724356),
    "ddim eta=1": (LEADING, "vp", 10, 1.493356, 1.855197, 2.081193, 1.894252),
    "ddim trailing": (TRAILING, "vp", 10, 1.362548, 1.746913, 2.084594, 2.272386),
    "ddim zero-snr": (ZERO_SNR_V, "vp", 10, 0.970089, 0.928271, 0.866647, 0.306893),
    "ddpm": (LEADING, "vp", 10, 1.493356, 1.855197, 2.081193, 1.859084),
    "plms": (LEADING, "vp", 11, 1.298881, 1.219415, 1.406358, 1.515919),
    "pndm_prk": (LEADING, "vp", 19, 1.138109, 1.105652, 1.240419, 1.544494),
    "euler": (LINSPACE, "ve", 10, 11.131380, 8.677550, 6.796787, 2.306272),
    "euler leading": (LEADING, "ve", 10, 6.794329, 5.429689, 4.367235, 1.691766),
    "euler trailing": (TRAILING, "ve", 10, 11.369392, 9.038441, 7.214639, 2.267411),
    "euler_karras": (LINSPACE, "ve", 10, 11.780783, 9.333236, 7.078059, 2.337068),
    "euler v": (LINSPACE_V, "ve", 10, 7.633671, 4.336368, 2.616314, 0.324251),
    "euler_a": (LINSPACE, "ve", 10, 12.571005, 9.978097, 7.579070, 2.115550),
    "heun": (LINSPACE, "ve", 19, 11.131380, 10.300186, 8.050219, 1.899301),
    "lms": (LINSPACE, "ve", 10, 11.131380, 8.488529, 6.462168, 2.135906),
    "dpm2": (LINSPACE, "ve", 19, 12.604011, 10.526163, 9.221290, 1.959694),
    "dpm2_a": (LINSPACE, "ve", 19, 11.131380, 10.016845, 7.836371, 1.594478),
    "dpmpp_2m": (LINSPACE, "vp", 10, 1.362548, 1.690178, 1.943577, 2.015232),
    "dpmpp_2m_karras": (LINSPACE, "vp", 10, 1.289324, 1.623146, 1.941944, 1.859569),
    "dpmpp_2m_sde": (LINSPACE, "vp", 10, 1.550009, 1.989888, 2.222644, 1.904740),
    "dpmpp_sde": (LINSPACE, "ve", 19, 14.775325, 12.512556, 11.649408, 1.924522),
    "unipc": (LINSPACE, "vp", 10, 1.362548, 1.645410, 1.872790, 1.995231),
    "deis": (LINSPACE, "vp", 10, 1.362548, 1.694790, 1.965621, 2.111730),
    "lcm": (LEADING, "vp", 4, 2.112375, 2.392223, 2.062118, 1.711466),
    "tcd": (LEADING, "vp", 4, 2.278608, 3.185724, 3.397355, 2.835746),
}


def variants():
    """Samplers that have no name: other options, other grids."""
    grid = lambda_grid(LINSPACE, 10)
    to_sigma_min = lambda_grid(LINSPACE, 10, final="sigma_min")
    pndm_grid = time_grid(LEADING, 10, set_alpha_to_one=False)
    dpm_solver, unipc = samplers_lambda.dpm_solver, samplers_lambda.unipc
    edm, edm_units = edm_grid(10), edm_precondition()
    return {
        "2m heun": (
            assemble(dpm_solver(grid, heun=True), grid),
            *("vp", 10, 1.362548, 1.685565, 1.932419, 1.996103),
        ),
        "2m, sigma_min": (
            assemble(dpm_solver(to_sigma_min), to_sigma_min),
            *("vp", 10, 1.362548, 1.690178, 1.943577, 2.057750),
        ),
        "3m": (
            assemble(dpm_solver(grid, order=3), grid),
            *("vp", 10, 1.362548, 1.690178, 1.933649, 2.055434),
        ),
        "2m of epsilon, sigma_min": (
            assemble(dpm_solver(to_sigma_min, epsilon=True), to_sigma_min),
            *("vp", 10, 1.362548, 1.690177, 1.956402, 2.097412),
        ),
        "unipc of order 3": (
            assemble(unipc(grid, order=3), grid),
            *("vp", 10, 1.362548, 1.645410, 1.858167, 1.999161),
        ),
        "ddim inverse": (
            assemble(samplers_time.ddim_inverse(pndm_grid), pndm_grid),
            *("vp", 10, 1.008068, 1.142989, 1.176112, 0.653083),
        ),
        "edm euler": (
            assemble(samplers_sigma.euler(edm), edm, precondition=edm_units),
            *("ve", 10, 42.584408, 21.372257, 10.041780, 0.989101),
        ),
        "edm 2m": (
            assemble(dpm_solver(edm), edm, precondition=edm_units),
            *("ve", 10, 42.584404, 21.373339, 10.044833, 1.471710),
        ),
    }


@jax.jit
def run(table: Tableau, z: jax.Array) -> jax.Array:
    def network(x, t, conditioning):
        return 0.6 * x + 0.1 * jnp.cos(t[:, None, None, None] / 100)

    noise = given_noise(z[:, None, None, None, None])
    return sample(
        make_denoiser(network, Conditioning()), jnp.ones((1, 1, 1, 1)), table, noise
    )


def states(table: Tableau, units: str) -> np.ndarray:
    """x after each row, in the scheduler's own units."""
    z = np.full(MIN_ROWS, 0.5, np.float32)
    rows = np.arange(1, int(table.num_rows) + 1)
    for k in rows - 1:
        # Brownian increments that overlap: the whole noise is to be 0.5, not the new.
        old, new = table.update[k, 0, 2], table.update[k, 0, -1]
        if old and new:
            z[k] = 0.5 * (np.hypot(old, new) - old) / new
    x = [run(table._replace(num_rows=np.asarray(n, np.int32)), z).item() for n in rows]
    return np.array(x) / (table.alpha[: len(x)] if units == "ve" else 1.0)


def check(table: Tableau, units: str, calls: int, *golden: float) -> None:
    x = states(table, units)
    assert len(x) == calls
    np.testing.assert_allclose([*x[:3], x[-1]], golden, rtol=1e-5)


@pytest.mark.parametrize("case", NAMED)
def test_named_sampler(case):
    schedule, units, calls, *golden = NAMED[case]
    name = case.split()[0]
    steps = 4 if name in ("lcm", "tcd") else 10
    eta = 1.0 if "eta=1" in case else None
    check(tableau(schedule, name, steps, eta=eta), units, calls, *golden)


@pytest.mark.parametrize("case", variants())
def test_variant(case):
    check(*variants()[case])


def test_compvis_plms_is_pndm_step_by_step():
    table = tableau(LEADING, "plms", 10)
    ends = np.flatnonzero(np.diff(table.step[: table.num_rows], append=10))
    x = states(table, "vp")[ends]
    golden = [1.219415, 1.406358, 1.535215, 1.515919]
    np.testing.assert_allclose([*x[:3], x[-1]], golden, rtol=1e-5)
