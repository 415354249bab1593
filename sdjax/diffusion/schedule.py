"""Noise schedules on the host, in float64: what t, ᾱ and σ are worth.

ᾱ_t = ∏(1 − β_s), α = √ᾱ, σ = √(1 − ᾱ); in variance-exploding units x/α the noise level
is σ/α. Ho et al. 2020, arXiv:2006.11239; Karras et al. 2022, arXiv:2206.00364.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdjax.config import ScheduleConfig
from sdjax.errors import SdjaxError
from sdjax.typing import Latent

TERMINAL_ALPHA_BAR = 2.0**-24
"""Stands for ᾱ = 0 where a noise level σ/α has to be finite (diffusers' value)."""


def betas(schedule: ScheduleConfig) -> Float[np.ndarray, " t"]:
    """The variances β_t of the forward process, before any zero-SNR rescale.

    Raises:
        SdjaxError: if the schedule names no known beta schedule.
    """
    steps = schedule.num_train_timesteps
    first, last = schedule.beta_start, schedule.beta_end
    if schedule.trained_betas is not None:
        return np.asarray(schedule.trained_betas, np.float64)
    if schedule.beta_schedule == "scaled_linear":
        return np.linspace(first**0.5, last**0.5, steps) ** 2
    if schedule.beta_schedule == "linear":
        return np.linspace(first, last, steps)
    if schedule.beta_schedule == "squaredcos_cap_v2":
        # Nichol & Dhariwal 2021, eq. 17, arXiv:2102.09672.
        u = np.arange(steps + 1) / steps
        alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise SdjaxError(
        f"beta_schedule is {schedule.beta_schedule!r}, but must be 'linear', "
        "'scaled_linear' or 'squaredcos_cap_v2'"
    )


def rescale_zero_terminal_snr(
    alpha_bar: Float[np.ndarray, " t"],
) -> Float[np.ndarray, " t"]:
    """Shifts and scales √ᾱ so that it ends at 0 and starts where it started.

    Lin et al. 2023, algorithm 1, arXiv:2305.08891.
    """
    root = np.sqrt(alpha_bar)
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    rescaled[-1] = 0.0
    return rescaled


def alpha_bars(schedule: ScheduleConfig) -> Float[np.ndarray, " t"]:
    """The share of signal ᾱ_t in [0, 1] for t = 0 … T − 1."""
    alpha_bar = np.cumprod(1 - betas(schedule))
    if schedule.rescale_betas_zero_snr:
        return rescale_zero_terminal_snr(alpha_bar)
    return alpha_bar


def noise_levels(alpha_bar: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """σ/α for each t; ᾱ_T = 0 is taken as 2⁻²⁴, which gives σ/α = 4096."""
    finite = np.where(alpha_bar > 0, alpha_bar, TERMINAL_ALPHA_BAR)
    return np.sqrt((1 - finite) / finite)


def time_of(
    level: float | np.ndarray, levels: Float[np.ndarray, " t"]
) -> Float[np.ndarray, "..."]:
    """The fractional time at which σ/α is `level`: linear in log σ/α, in [0, T − 1]."""
    return np.interp(np.log(level), np.log(levels), np.arange(len(levels)))


def spaced_timesteps(
    spacing: str, num_steps: int, num_train_timesteps: int, offset: int = 0
) -> Float[np.ndarray, " n"]:
    """`num_steps` times in [0, T − 1], latest first; Lin et al. 2023, table 2.

    "linspace" includes both ends and is fractional; the others are whole numbers. Where
    the offset of "leading" would leave the schedule, it gives way.

    Raises:
        SdjaxError: if the spacing is unknown.
    """
    count = np.arange(num_steps)
    if spacing == "linspace":
        return np.linspace(0, num_train_timesteps - 1, num_steps)[::-1]
    if spacing == "leading":
        times = count[::-1] * (num_train_timesteps // num_steps)
        return times + float(min(offset, num_train_timesteps - 1 - times[0]))
    if spacing == "trailing":
        stride = num_train_timesteps / num_steps
        return np.round(num_train_timesteps - count * stride) - 1
    raise SdjaxError(
        f"timestep_spacing is {spacing!r}, but must be 'leading', 'trailing' or "
        "'linspace'"
    )


def karras_levels(first: float, last: float, num: int) -> Float[np.ndarray, " n"]:
    """Noise levels from `first` down to `last`, ρ = 7; Karras et al. 2022, eq. 5."""
    ramp = np.linspace(0, 1, num)
    return (first ** (1 / 7) + ramp * (last ** (1 / 7) - first ** (1 / 7))) ** 7


def exponential_levels(first: float, last: float, num: int) -> Float[np.ndarray, " n"]:
    """Noise levels from `first` down to `last`, evenly spaced in their logarithm."""
    return np.exp(np.linspace(np.log(first), np.log(last), num))


def add_noise(
    x0: Latent,
    eps: Latent,
    t: Int[Array, " b"],
    alpha_bar: Float[Array, " t"] | Float[np.ndarray, " t"],
) -> Latent:
    """Noises each sample to its own time: x_t = √ᾱ x0 + √(1 − ᾱ) ε.

    Ho et al. 2020, eq. 4, arXiv:2006.11239.
    """
    share = jnp.asarray(alpha_bar, jnp.float32)[t][:, None, None, None]  # [B, 1, 1, 1]
    return jax.lax.sqrt(share) * x0 + jax.lax.sqrt(1 - share) * eps
