"""Noise schedules and spacings against recorded numbers and closed forms."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import ScheduleConfig
from sdjax.diffusion import add_noise, alpha_bars
from sdjax.diffusion.grid import (
    distilled_grid,
    lambda_grid,
    sigma_grid,
    time_grid,
)
from sdjax.diffusion.schedule import (
    betas,
    karras_levels,
    noise_levels,
    spaced_timesteps,
    time_of,
)
from sdjax.errors import SdjaxError

SD = ScheduleConfig()
RECORDED = 5e-5  # of products and differences that diffusers makes in float32


def times(grid):
    return [node.t for node in grid.nodes[:-1]]


def levels(grid):
    return [node.level for node in grid.nodes[:-1]]


@pytest.mark.parametrize(
    ("first", "last", "kind", "ends"),
    [
        (0.00085, 0.012, "scaled_linear", (0.99915, 0.004660099)),
        (0.0015, 0.0195, "scaled_linear", (0.9985, 0.000142304)),
        (0.0015, 0.0155, "scaled_linear", (0.9985, 0.000668665)),
        (0.0015, 0.0205, "scaled_linear", (0.9985, 0.0000969107)),
        (0.0001, 0.02, "scaled_linear", (0.9999, 0.000733412)),
        (0.0001, 0.02, "linear", (0.9999, 4.03583e-5)),
        (0.0001, 0.02, "squaredcos_cap_v2", (0.999958694, 2.42873e-9)),
    ],
)
def test_ends_of_known_schedules(first, last, kind, ends):
    schedule = ScheduleConfig(beta_start=first, beta_end=last, beta_schedule=kind)
    alpha_bar = alpha_bars(schedule)
    np.testing.assert_allclose(alpha_bar[[0, -1]], ends, rtol=RECORDED)


def test_stable_diffusion_in_between():
    golden = {1: 0.998296028, 100: 0.894223478, 500: 0.276332684, 981: 0.0057755001}
    alpha_bar = alpha_bars(SD)
    np.testing.assert_allclose(
        alpha_bar[list(golden)], list(golden.values()), rtol=2e-6
    )
    np.testing.assert_allclose(
        noise_levels(alpha_bar)[[0, -1]], [0.029167, 14.614641], rtol=2e-5
    )


def test_zero_terminal_snr():
    alpha_bar = alpha_bars(dataclasses.replace(SD, rescale_betas_zero_snr=True))
    np.testing.assert_allclose(
        alpha_bar[[0, 500, 998]], [0.99915, 0.2410185, 1.96796e-7], rtol=RECORDED
    )
    assert alpha_bar[-1] == 0
    np.testing.assert_allclose(noise_levels(alpha_bar)[-1], 4095.99988, rtol=1e-7)


def test_trained_betas_are_taken_as_they_are():
    given = (0.1, 0.2, 0.3)
    schedule = ScheduleConfig(num_train_timesteps=3, trained_betas=given)
    np.testing.assert_array_equal(betas(schedule), given)
    np.testing.assert_allclose(alpha_bars(schedule), [0.9, 0.72, 0.504])


@pytest.mark.parametrize(
    ("spacing", "head", "tail"),
    [
        ("leading", [981, 961, 941], [21, 1]),
        ("trailing", [999, 979, 959], [39, 19]),
        ("linspace", [999, 978.612244, 958.224487], [20.387754, 0]),
    ],
)
def test_fifty_steps(spacing, head, tail):
    spaced = spaced_timesteps(spacing, 50, 1000, 1)
    np.testing.assert_allclose([*spaced[:3], *spaced[-2:]], [*head, *tail], rtol=1e-7)


@pytest.mark.parametrize(
    ("spacing", "golden"),
    [
        ("linspace", [999, 949, 899, 100, 50]),
        ("leading", [941, 894, 847, 95, 48]),
        ("trailing", [999, 949, 899, 99, 49]),
    ],
)
def test_twenty_steps_of_multistep_solvers(spacing, golden):
    schedule = ScheduleConfig(timestep_spacing=spacing, steps_offset=1)
    found = times(lambda_grid(schedule, 20))
    assert [*found[:3], *found[-2:]] == golden


def test_karras_levels_and_their_times():
    found = times(lambda_grid(SD, 20, "karras"))
    assert found[:5] == [999, 962, 921, 876, 827]
    assert found[-4:] == [15, 6, 2, 0]
    edm = karras_levels(80, 0.002, 5)
    np.testing.assert_allclose(
        edm, [80, 17.527832, 2.515219, 0.169753, 0.002], rtol=5e-6
    )


def test_turbo_levels():
    schedule = ScheduleConfig(timestep_spacing="trailing")
    grid = sigma_grid(schedule, 4)
    assert times(grid) == [999, 749, 499, 249]
    golden = [14.614647, 4.081731, 1.612887, 0.693205]
    np.testing.assert_allclose(levels(grid), golden, rtol=2e-6)
    zero = dataclasses.replace(schedule, rescale_betas_zero_snr=True)
    golden = [4095.99976, 5.398741, 1.768081, 0.727056]
    np.testing.assert_allclose(levels(sigma_grid(zero, 4)), golden, rtol=2e-5)


@pytest.mark.parametrize(
    ("spacing", "first"), [("linspace", 14.614647), ("leading", 13.158469)]
)
def test_how_loud_sampling_starts(spacing, first):
    schedule = ScheduleConfig(timestep_spacing=spacing, steps_offset=1)
    grid = sigma_grid(schedule, 50)
    scale = grid.init_scale / grid.nodes[0].alpha  # of x/α
    np.testing.assert_allclose(scale, first, rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "golden"),
    [
        (1, [999]),
        (2, [999, 499]),
        (4, [999, 759, 499, 259]),
        (8, [999, 879, 759, 639, 499, 379, 259, 139]),
    ],
)
def test_distilled_times(steps, golden):
    assert times(distilled_grid(SD, steps)) == golden


def test_time_of_a_level_is_its_own():
    table = noise_levels(alpha_bars(SD))
    np.testing.assert_allclose(time_of(table, table), np.arange(1000), atol=1e-9)
    np.testing.assert_array_equal(time_of(np.array([1e-3, 1e3]), table), [0, 999])


def test_final_level_is_the_schedules_word_against_the_samplers():
    assert time_grid(SD, 10, set_alpha_to_one=True).final.alpha == 1
    first = alpha_bars(SD)[0] ** 0.5
    assert time_grid(SD, 10, set_alpha_to_one=False).final.alpha == first
    said = dataclasses.replace(SD, set_alpha_to_one=False)
    assert time_grid(said, 10, set_alpha_to_one=True).final.alpha == first


def test_an_offset_never_leaves_the_schedule():
    assert spaced_timesteps("leading", 1000, 1000, 1)[0] == 999


def test_strength_leaves_the_first_steps_out():
    grid = time_grid(SD, 10, set_alpha_to_one=True)
    assert times(grid.cut(0.35)) == [200, 100, 0]
    assert grid.cut(1.0).nodes == grid.nodes


def test_each_sample_is_noised_to_its_own_time():
    x0, eps = jnp.ones((2, 1, 1, 1)), jnp.full((2, 1, 1, 1), 2.0)
    alpha_bar = np.array([0.64, 0.36])
    x = add_noise(x0, eps, jnp.array([1, 0]), alpha_bar)
    np.testing.assert_allclose(x.ravel(), [0.6 + 1.6, 0.8 + 1.2], rtol=1e-6)


def test_an_unknown_word_is_named():
    with pytest.raises(SdjaxError, match=r"beta_schedule is 'sqrt'.*scaled_linear"):
        betas(dataclasses.replace(SD, beta_schedule="sqrt"))
    with pytest.raises(SdjaxError, match=r"timestep_spacing is 'quad'"):
        spaced_timesteps("quad", 10, 1000)
