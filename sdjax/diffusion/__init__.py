"""Schedules, samplers, guidance and the sampling loop; no networks, no files.

Three choices that do not depend on each other: `tableau` makes the table of a sampler
on the host, `guide` and `make_denoiser` wrap a network, `sample` runs the one through
the other.
"""

from sdjax.diffusion.denoiser import make_denoiser
from sdjax.diffusion.guidance import guide
from sdjax.diffusion.loop import given_noise, initial_noise, keyed_noise, sample
from sdjax.diffusion.samplers import SAMPLER_NAMES, SAMPLERS, clip_range, tableau
from sdjax.diffusion.schedule import add_noise, alpha_bars
from sdjax.diffusion.table import Tableau

__all__ = [
    "SAMPLERS",
    "SAMPLER_NAMES",
    "Tableau",
    "add_noise",
    "alpha_bars",
    "clip_range",
    "given_noise",
    "guide",
    "initial_noise",
    "keyed_noise",
    "make_denoiser",
    "sample",
    "tableau",
]
