"""The samplers by name, and the one function that makes the table of any of them."""

import difflib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from sdjax.config import ScheduleConfig
from sdjax.diffusion import samplers_lambda, samplers_sigma, samplers_time
from sdjax.diffusion.grid import (
    Grid,
    Levels,
    distilled_grid,
    lambda_grid,
    sigma_grid,
    time_grid,
)
from sdjax.diffusion.table import Rows, Tableau, assemble
from sdjax.errors import SdjaxError


class Sampler(NamedTuple):
    """How a sampler is made.

    Attributes:
        rows: of the sampler, given the grid, and η where it takes one.
        grid: its noise levels, given the schedule, the number of steps and, where it
            takes them, the kind of levels.
        takes_eta: whether it has a stochasticity η in [0, 1].
        takes_levels: whether it has Karras and exponential noise levels.
        clips: whether `clip_sample` limits its x0; None: it would have to, but cannot.
    """

    rows: Callable[..., Rows]
    grid: Callable[..., Grid]
    takes_eta: bool = False
    takes_levels: bool = True
    clips: bool | None = False


_ddim_grid = functools.partial(time_grid, set_alpha_to_one=True)
_ddpm_grid = functools.partial(time_grid, set_alpha_to_one=None)
_pndm_grid = functools.partial(time_grid, set_alpha_to_one=False)
_dpm2_grid = functools.partial(sigma_grid, whole_karras_times=True)
_deis_grid = functools.partial(lambda_grid, final="sigma_min")
_dpmpp_2m_sde = functools.partial(samplers_lambda.dpm_solver, eta=1.0)
_dpmpp_3m_sde = functools.partial(
    samplers_lambda.dpm_solver, eta=1.0, order=3, heun=True, k_diffusion=True
)

SAMPLERS = {
    "ddim": Sampler(samplers_time.ddim, _ddim_grid, True, False, None),
    "ddpm": Sampler(samplers_time.ddpm, _ddpm_grid, False, False, True),
    "plms": Sampler(samplers_time.plms, _pndm_grid, False, False),
    "pndm_prk": Sampler(samplers_time.pndm_prk, _pndm_grid, False, False),
    "lcm": Sampler(samplers_time.lcm, distilled_grid, False, False, True),
    "tcd": Sampler(samplers_time.tcd, distilled_grid, True, False, None),
    "euler": Sampler(samplers_sigma.euler, sigma_grid),
    "euler_a": Sampler(samplers_sigma.euler_a, sigma_grid, True),
    "heun": Sampler(samplers_sigma.heun, sigma_grid, clips=True),
    "lms": Sampler(samplers_sigma.lms, sigma_grid),
    "dpm2": Sampler(samplers_sigma.dpm2, _dpm2_grid),
    "dpm2_a": Sampler(samplers_sigma.dpm2_a, _dpm2_grid, True),
    "dpmpp_2s_a": Sampler(samplers_sigma.dpmpp_2s_a, sigma_grid, True),
    "dpmpp_sde": Sampler(samplers_sigma.dpmpp_sde, sigma_grid),
    "dpmpp_2m": Sampler(samplers_lambda.dpm_solver, lambda_grid),
    "dpmpp_2m_sde": Sampler(_dpmpp_2m_sde, lambda_grid, True),
    "dpmpp_3m_sde": Sampler(_dpmpp_3m_sde, sigma_grid, True),
    "unipc": Sampler(samplers_lambda.unipc, lambda_grid),
    "deis": Sampler(samplers_lambda.deis, _deis_grid),
}

SAMPLER_NAMES: tuple[str, ...] = tuple(
    name + suffix
    for name, sampler in SAMPLERS.items()
    for suffix in ("", "_karras", "_exponential")
    if sampler.takes_levels or not suffix
)
"""Every name that `tableau` takes."""


def tableau(
    schedule: ScheduleConfig,
    sampler: str,
    num_inference_steps: int,
    *,
    eta: float | None = None,
    strength: float = 1.0,
    pad: bool = True,
) -> Tableau:
    """The table of a sampler: what the compiled sampling loop takes as its input.

    Args:
        schedule: what the model was trained with; where it says how to space the steps,
            it is followed, and the sampler's own way as in diffusers otherwise.
        sampler: one of `SAMPLER_NAMES`.
        num_inference_steps: from 1 to the number of training timesteps.
        eta: stochasticity in [0, 1] of the samplers that have one; None: theirs.
        strength: in (0, 1], the share of the steps that image-to-image makes.
        pad: to one shape for all tables (of up to 1024 rows), so that no change of
            these arguments compiles anything; otherwise the loop can be differentiated.

    Raises:
        SdjaxError: if an argument is out of its range or does not fit the sampler.
    """
    entry, levels = _find(sampler)
    steps = num_inference_steps
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise SdjaxError(
            f"num_inference_steps is {steps}, but must be between 1 and "
            f"{schedule.num_train_timesteps}"
        )
    _check_eta(sampler, entry, eta)
    options: dict[str, Any] = {} if levels is None else {"levels": levels}
    grid = entry.grid(schedule, steps, **options).cut(strength)
    rows = entry.rows(grid) if eta is None else entry.rows(grid, eta=eta)
    return assemble(rows, grid, pad=pad)


def clip_range(schedule: ScheduleConfig, sampler: str) -> float | None:
    """To what |x0| is limited with this sampler; None: not at all.

    As in diffusers, most samplers ignore `clip_sample`.

    Raises:
        SdjaxError: if the schedule asks a sampler to clip that cannot.
    """
    entry, _ = _find(sampler)
    if not schedule.clip_sample or entry.clips is False:
        return None
    if entry.clips is None:
        able = ", ".join(name for name, other in SAMPLERS.items() if other.clips)
        raise SdjaxError(
            f"clip_sample is true, which sampler {sampler!r} cannot do: set it to "
            f"false or use one of {able}"
        )
    return schedule.clip_sample_range


def _find(sampler: str) -> tuple[Sampler, Levels | None]:
    """The sampler and the kind of noise levels that a name stands for."""
    if sampler in SAMPLERS:
        return SAMPLERS[sampler], None
    for levels in get_args(Levels):
        entry = SAMPLERS.get(sampler.removesuffix(f"_{levels}"))
        if entry is None:
            continue
        if entry.takes_levels:
            return entry, levels
        raise SdjaxError(
            f"sampler {sampler!r} does not exist: {sampler.removesuffix(f'_{levels}')} "
            f"is defined on training times and takes no {levels} noise levels"
        )
    close = difflib.get_close_matches(sampler, SAMPLER_NAMES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise SdjaxError(
        f"unknown sampler {sampler!r}; {hint}There are {', '.join(SAMPLERS)}, most of "
        "them also with _karras or _exponential appended"
    )


def _check_eta(name: str, entry: Sampler, eta: float | None) -> None:
    if eta is None:
        return
    if not entry.takes_eta:
        able = ", ".join(key for key, other in SAMPLERS.items() if other.takes_eta)
        raise SdjaxError(
            f"eta is {eta}, but sampler {name!r} has no eta; those that do are {able}"
        )
    if not 0 <= eta <= 1:
        raise SdjaxError(f"eta is {eta}, but must be between 0 and 1")
