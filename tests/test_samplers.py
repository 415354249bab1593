"""Samplers against closed forms and each other; what their names and limits are."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.config import ScheduleConfig
from sdjax.diffusion import SAMPLER_NAMES, SAMPLERS, clip_range, tableau
from sdjax.diffusion.grid import Grid, node_at_level
from sdjax.diffusion.samplers_lambda import deis, dpm_solver, unipc
from sdjax.diffusion.samplers_sigma import dpm2, dpmpp_2s_a, euler, heun, lms
from sdjax.diffusion.table import SLOTS
from sdjax.errors import SdjaxError

SD = ScheduleConfig()
DATA = 0.7
"""Standard deviation of Gaussian data, for which D and the ODE have closed forms."""


def solve(rows, x=1.0):
    """Runs rows in float64 on Gaussian data: D = s²αx / (s²α² + σ²)."""
    state = np.zeros(SLOTS)
    state[0] = x
    for row in rows:
        alpha, sigma = row.at.alpha, row.at.sigma
        denoised = DATA**2 * alpha * state[0] / (DATA**2 * alpha**2 + sigma**2)
        columns = np.array([*state, denoised, 0.0])
        for slot, vector in enumerate(row[3:]):
            if vector is not None:
                state[slot] = vector @ columns
    return state


def smooth_grid(steps):
    """σ/α from 5 to 0.2 in even steps of its log, away from both ends.

    The first steps are tiny and double: multistep methods start with lower orders.
    """
    h = np.log(25) / steps
    sizes = [h**2]
    while sizes[-1] * 2 < h:
        sizes.append(sizes[-1] * 2)
    left = np.log(25) - sum(sizes)
    sizes += [left / round(left / h)] * round(left / h)
    levels = 5.0 * np.exp(-np.cumsum([0.0, *sizes]))
    return Grid(
        nodes=tuple(node_at_level(level, 0.0) for level in levels),
        num_steps=len(sizes),
        alpha_bar=np.array([0.999, 0.5, 0.01]),
        prediction_type="sample",
    )


def error(sampler, steps, **options):
    grid = smooth_grid(steps)
    # UniPC's last step is of order one; h1 has the corrected x before it.
    slot, end = (1, -2) if sampler is unipc else (0, -1)
    first, last = grid.nodes[0], grid.nodes[end]
    spread = lambda n: (DATA**2 * n.alpha**2 + n.sigma**2) ** 0.5
    exact = spread(last) / spread(first)  # the flow keeps x in units of its spread
    return abs(solve(sampler(grid, **options))[slot] - exact)


@pytest.mark.parametrize(
    ("sampler", "options", "order"),
    [
        (euler, {}, 1),
        (dpm_solver, {"order": 1}, 1),
        (heun, {}, 2),
        (dpm2, {}, 2),
        (dpmpp_2s_a, {"eta": 0.0}, 2),
        (dpm_solver, {}, 2),
        (dpm_solver, {"heun": True}, 2),
        (dpm_solver, {"epsilon": True}, 2),
        (deis, {}, 2),
        (dpm_solver, {"order": 3, "heun": True}, 2),  # sic, see there
        (deis, {"order": 3}, 3),
        (unipc, {}, 3),
        (unipc, {"order": 3}, 4),
        (lms, {}, 4),
    ],
)
def test_order_of_convergence(sampler, options, order):
    coarse, fine = (error(sampler, steps, **options) for steps in (80, 160))
    assert order - 0.2 < np.log2(coarse / fine) < order + 0.5


def test_lms_is_exact_for_slopes_cubic_in_sigma():
    levels = [4.0, 3.1, 2.5, 1.2, 0.6, 0.1]
    grid = dataclasses.replace(
        smooth_grid(5), nodes=tuple(node_at_level(s, 0.0) for s in levels)
    )
    slope = np.polynomial.Polynomial([0.3, -1.0, 0.5, 0.2])
    state = np.zeros(SLOTS)
    for row in lms(grid):
        level, alpha = row.at.level, row.at.alpha
        denoised = state[0] / alpha - level * slope(level)  # so that d is the slope
        before = state[0] / alpha
        columns = np.array([*state, denoised, 0.0])
        state = np.array([v @ columns for v in row[3:7]] + [0.0, 0.0])
        if row.step >= 3:
            gained = state[0] / row.to.alpha - before
            exact = slope.integ()(row.to.level) - slope.integ()(level)
            np.testing.assert_allclose(gained, exact, rtol=1e-9)


def test_ddim_is_euler():
    schedule = ScheduleConfig(timestep_spacing="leading", steps_offset=1)
    table = [tableau(schedule, name, 20) for name in ("ddim", "euler")]
    np.testing.assert_allclose(table[0].update, table[1].update, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table[0].level, table[1].level, rtol=1e-5)


def test_padding_is_never_run_and_changes_nothing():
    short, long = (tableau(SD, "unipc", 12, pad=pad) for pad in (False, True))
    assert short.num_rows is None
    assert long.num_rows == len(short.update) == 12
    np.testing.assert_array_equal(long.update[:12], short.update)
    np.testing.assert_array_equal(long.level[:12], short.level)
    assert long.update.shape == tableau(SD, "heun", 50).update.shape


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(SAMPLER_NAMES),
    steps=st.integers(1, 1000),
    spacing=st.sampled_from([None, "leading", "trailing", "linspace"]),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    strength=st.floats(0.01, 1.0),
)
def test_every_table_is_finite(name, steps, spacing, prediction, strength):
    schedule = ScheduleConfig(
        timestep_spacing=spacing, steps_offset=1, prediction_type=prediction
    )
    try:
        table = tableau(schedule, name, steps, strength=strength)
    except SdjaxError as refusal:
        assert any(
            words in str(refusal)
            for words in ("at most 50", "leaves no step", "needs 4", "1001 of")
        )
        return
    for values in table:
        assert np.all(np.isfinite(values))
    rows = int(table.num_rows)
    assert rows >= 1
    # The last row ends at, or next to, the clean latents.
    assert table.sigma[rows - 1] < 0.05
    assert np.all(np.diff(table.step[:rows]) >= 0)


def test_eta_of_one_is_the_variance_of_ddpm():
    schedule = ScheduleConfig(timestep_spacing="leading", set_alpha_to_one=True)
    ddim, ddpm = tableau(schedule, "ddim", 20, eta=1.0), tableau(schedule, "ddpm", 20)
    np.testing.assert_allclose(ddim.update, ddpm.update, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, s in SAMPLERS.items() if s.takes_eta])
def test_eta_of_zero_draws_nothing(name):
    assert not np.any(tableau(SD, name, 8, eta=0.0).update[:, :, -1])
    assert np.any(tableau(SD, name, 8, eta=1.0).update[:, :, -1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sampler": "eulr"}, "unknown sampler 'eulr'; did you mean 'euler'"),
        ({"sampler": "ddim_karras"}, "ddim is defined on training times"),
        ({"sampler": "karras"}, "unknown sampler 'karras'"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0.*between 1 and 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ({"sampler": "lcm", "num_inference_steps": 51}, "at most 50"),
        ({"sampler": "pndm_prk", "num_inference_steps": 3}, "needs 4 steps"),
        ({"eta": 0.5}, "sampler 'euler' has no eta"),
        ({"sampler": "ddim", "eta": 1.5}, "eta is 1.5, but must be between 0 and 1"),
        ({"sampler": "ddim", "eta": float("nan")}, "eta is nan"),
        ({"strength": 0.0}, "strength is 0.0"),
        ({"strength": 1.01}, "strength is 1.01"),
        ({"strength": 0.05}, "leaves no step: raise strength to 0.1"),
    ],
)
def test_bad_arguments_are_explained(arguments, words):
    arguments = {"sampler": "euler", "num_inference_steps": 10, **arguments}
    with pytest.raises(SdjaxError, match=words):
        tableau(SD, **arguments)


def test_no_signal_and_epsilon_cannot_go_together():
    schedule = ScheduleConfig(timestep_spacing="trailing", rescale_betas_zero_snr=True)
    with pytest.raises(SdjaxError, match=r"'epsilon' cannot be sampled from t = 999"):
        tableau(schedule, "ddim", 10)


def test_clipping_is_for_those_that_can():
    clips = dataclasses.replace(SD, clip_sample=True, clip_sample_range=2.0)
    assert clip_range(clips, "ddpm") == 2.0
    assert clip_range(clips, "dpmpp_2m_karras") is None
    assert clip_range(SD, "ddim") is None
    with pytest.raises(SdjaxError, match=r"clip_sample is true.*'ddim'.*ddpm, lcm"):
        clip_range(clips, "ddim")


def test_tables_are_host_arrays():
    table = tableau(SD, "euler", 3)
    assert not any(isinstance(values, jnp.ndarray) for values in table)
