"""Grids of noise levels, on which samplers are written.

A node is one noise level x = αx0 + σε, α² + σ² = 1, with the time the network is told.
A grid is the N + 1 nodes that N sampling steps go through, with the schedule around
them. There are four kinds, after the schedulers of diffusers: `time_grid` (DDIM, DDPM,
PNDM), `sigma_grid` (Euler and other samplers in variance-exploding units),
`lambda_grid` (DPM-Solver, UniPC, DEIS) and `distilled_grid` (LCM, TCD).
"""

import dataclasses
import itertools
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from sdjax.config import PredictionType, ScheduleConfig
from sdjax.diffusion import schedule as noise_schedule
from sdjax.errors import SdjaxError

Levels = Literal["karras", "exponential"]

_SPACED_LEVELS = {
    "karras": noise_schedule.karras_levels,
    "exponential": noise_schedule.exponential_levels,
}


class Node(NamedTuple):
    """A noise level: x = `alpha`·x0 + `sigma`·ε; the network is told `t`."""

    t: float
    alpha: float
    sigma: float

    @property
    def level(self) -> float:
        """σ/α, the noise level in variance-exploding units."""
        return self.sigma / self.alpha


CLEAN = Node(t=0.0, alpha=1.0, sigma=0.0)


def node_at_level(level: float, t: float) -> Node:
    """The node whose σ/α is `level`."""
    alpha = 1 / np.sqrt(level**2 + 1)
    return Node(float(t), float(alpha), float(level * alpha))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """The noise levels that sampling goes through.

    Attributes:
        nodes: noisiest first; the last is where sampling ends.
        num_steps: N; more than len(nodes) - 1 where the first nodes were cut off.
        init_scale: what unit-variance noise is multiplied by to be x at the first node.
        alpha_bar: of the schedule, for t = 0 … T − 1.
        final: the node beyond t = 0.
        prediction_type: what the network predicts.
    """

    nodes: tuple[Node, ...]
    num_steps: int
    init_scale: float = 1.0
    alpha_bar: Float[np.ndarray, " t"]
    final: Node = CLEAN
    prediction_type: PredictionType

    @property
    def stride(self) -> int:
        """Training timesteps per sampling step, T // N."""
        return len(self.alpha_bar) // self.num_steps

    @property
    def steps(self) -> list[tuple[int, Node, Node]]:
        """Each step's number, and the nodes it leads from and to."""
        pairs = itertools.pairwise(self.nodes)
        return [(i, now, after) for i, (now, after) in enumerate(pairs)]

    def at_time(self, t: float) -> Node:
        """The node at the whole time `t`; before 0 it is the final node."""
        if t < 0:
            return self.final
        alpha_bar = self.alpha_bar[min(int(t), len(self.alpha_bar) - 1)]
        return Node(float(t), float(alpha_bar**0.5), float((1 - alpha_bar) ** 0.5))

    def at_level(self, level: float) -> Node:
        """The node with σ/α = `level`, at its fractional time."""
        if level == 0:
            return CLEAN
        levels = noise_schedule.noise_levels(self.alpha_bar)
        return node_at_level(level, noise_schedule.time_of(level, levels).item())

    def cut(self, strength: float) -> "Grid":
        """Leaves the first steps out: image-to-image makes int(N·strength) steps.

        Raises:
            SdjaxError: if strength is not in (0, 1], or too small for a single step.
        """
        if not 0 < strength <= 1:
            raise SdjaxError(f"strength is {strength}, but must be in (0, 1]")
        steps = int(self.num_steps * strength)
        if steps < 1:
            raise SdjaxError(
                f"strength {strength} of {self.num_steps} steps leaves no step: raise "
                f"strength to {1 / self.num_steps:.3g} or more, or take more steps"
            )
        # Grids that left a repeated level out have fewer than N steps to begin with.
        first = max(len(self.nodes) - 1 - steps, 0)
        return dataclasses.replace(self, nodes=self.nodes[first:])


def time_grid(
    schedule: ScheduleConfig, num_steps: int, *, set_alpha_to_one: bool | None
) -> Grid:
    """Whole training times, variance preserving, "leading" unless the schedule says.

    Args:
        schedule: the noise schedule.
        num_steps: N.
        set_alpha_to_one: whether the end is ᾱ = 1 or ᾱ_0, where the schedule does not
            say; None: ᾱ = 1 whatever it says.
    """
    alpha_bar = noise_schedule.alpha_bars(schedule)
    spacing = schedule.timestep_spacing or "leading"
    times = np.round(_spaced(schedule, spacing, num_steps))
    if set_alpha_to_one is not None and schedule.set_alpha_to_one is not None:
        set_alpha_to_one = schedule.set_alpha_to_one
    grid = Grid(
        nodes=(),
        num_steps=num_steps,
        alpha_bar=alpha_bar,
        prediction_type=schedule.prediction_type,
    )
    if set_alpha_to_one is False:
        grid = dataclasses.replace(grid, final=grid.at_time(0))
    nodes = (*(grid.at_time(t) for t in times), grid.final)
    return dataclasses.replace(grid, nodes=nodes)


def distilled_grid(
    schedule: ScheduleConfig, num_steps: int, *, original_steps: int = 50
) -> Grid:
    """Times out of the `original_steps` that a consistency model was distilled on.

    Luo et al. 2023, arXiv:2310.04378.

    Raises:
        SdjaxError: if there are more steps than that.
    """
    if num_steps > original_steps:
        raise SdjaxError(
            f"num_inference_steps is {num_steps}, but a distilled sampler takes at "
            f"most {original_steps}"
        )
    alpha_bar = noise_schedule.alpha_bars(schedule)
    origin = np.arange(original_steps, 0, -1) * (len(alpha_bar) // original_steps) - 1
    chosen = np.floor(np.linspace(0, original_steps, num_steps, endpoint=False))
    grid = Grid(
        nodes=(),
        num_steps=num_steps,
        alpha_bar=alpha_bar,
        prediction_type=schedule.prediction_type,
    )
    nodes = (*(grid.at_time(t) for t in origin[chosen.astype(int)]), CLEAN)
    return dataclasses.replace(grid, nodes=nodes)


def sigma_grid(
    schedule: ScheduleConfig,
    num_steps: int,
    levels: Levels | None = None,
    *,
    whole_karras_times: bool = False,
) -> Grid:
    """Noise levels at fractional times, "linspace" unless the schedule says.

    Karras and exponential levels run between the ends of the spaced ones.
    """
    alpha_bar = noise_schedule.alpha_bars(schedule)
    table = noise_schedule.noise_levels(alpha_bar)
    spacing = schedule.timestep_spacing or "linspace"
    times = _spaced(schedule, spacing, num_steps)
    values = np.interp(times, np.arange(len(table)), table)
    if levels is not None:
        values = _SPACED_LEVELS[levels](values[0], values[-1], num_steps)
        times = noise_schedule.time_of(values, table)
    if levels == "karras" and whole_karras_times:
        times = np.round(times)
    # diffusers starts "leading" at full variance and the others at the noise's alone.
    scale = 1.0 if spacing == "leading" else values[0] / np.sqrt(values[0] ** 2 + 1)
    return Grid(
        nodes=(*map(node_at_level, values, times), CLEAN),
        num_steps=num_steps,
        init_scale=float(scale),
        alpha_bar=alpha_bar,
        prediction_type=schedule.prediction_type,
    )


def lambda_grid(
    schedule: ScheduleConfig,
    num_steps: int,
    levels: Levels | None = None,
    *,
    final: Literal["zero", "sigma_min"] = "zero",
) -> Grid:
    """Whole times; the earliest is not visited, since sampling ends beyond it.

    Karras and exponential levels run between the ends of the whole schedule. Levels
    that repeat (1000 "linspace" steps of 1000) are left out; the end may be one.

    Args:
        schedule: the noise schedule; "linspace" unless it says.
        num_steps: N.
        levels: how to space noise levels, None: by time.
        final: whether sampling ends at σ = 0 or at the schedule's smallest σ.
    """
    alpha_bar = noise_schedule.alpha_bars(schedule)
    table = noise_schedule.noise_levels(alpha_bar)
    spacing = schedule.timestep_spacing or "linspace"
    if levels is not None:
        values = _SPACED_LEVELS[levels](table[-1], table[0], num_steps)
        times = noise_schedule.time_of(values, table)
        # diffusers truncates exponential times; rounding puts its first below 999.
        cut = np.maximum(np.trunc(times - 1e-6), 0)
        times = np.round(times) if levels == "karras" else cut
    elif spacing == "trailing":
        times = _spaced(schedule, spacing, num_steps)
        values = table[times.astype(int)]
    else:
        times = np.round(_spaced(schedule, spacing, num_steps + 1))[:-1]
        values = table[times.astype(int)]
    end = CLEAN if final == "zero" else node_at_level(table[0], 0.0)
    visited = [*map(node_at_level, values, times)]
    moving = [
        now
        for now, after in itertools.pairwise(visited)
        if not np.isclose(now.level, after.level, rtol=1e-9)
    ]
    return Grid(
        nodes=(*moving, visited[-1], end),
        num_steps=num_steps,
        alpha_bar=alpha_bar,
        prediction_type=schedule.prediction_type,
    )


def _spaced(schedule: ScheduleConfig, spacing: str, num: int) -> np.ndarray:
    """Times by the schedule's offset; more of them than there are is an error."""
    if spacing == "leading" and num > schedule.num_train_timesteps:
        raise SdjaxError(
            f"num_inference_steps is too large: 'leading' spacing needs {num} of the "
            f"{schedule.num_train_timesteps} training timesteps"
        )
    offset = schedule.steps_offset or 0
    return noise_schedule.spaced_timesteps(
        spacing, num, schedule.num_train_timesteps, offset
    )
