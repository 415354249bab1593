"""Every sampler against the scheduler of diffusers it is named after, on a toy network.

The network is not linear, its noise is handed to both, and its latents are vectors.
"""

import dataclasses
import importlib
import inspect
import itertools
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import ScheduleConfig
from sdjax.diffusion import (
    SAMPLERS,
    clip_range,
    given_noise,
    make_denoiser,
    sample,
    tableau,
)
from sdjax.diffusion.table import MIN_ROWS
from sdjax.typing import Conditioning

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch and diffusers deprecate each other
    diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.parity,
    # numpy 2 on diffusers' arrays of one element; its own deprecations of old solvers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "plms": "PNDMScheduler",
    "pndm_prk": "PNDMScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "dpmpp_sde": "DPMSolverSDEScheduler",
}
OPTIONS = {
    "plms": {"skip_prk_steps": True},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
}
SHAPE = (2, 3, 3, 2)
PREDICTIONS = ("epsilon", "v_prediction")
STEPS = (1, 2, 4, 10, 20, 50)
SPACINGS = ("leading", "trailing", "linspace")
rng = np.random.default_rng(0)
START = rng.normal(size=SHAPE).astype(np.float32)
NOISE = rng.normal(size=(MIN_ROWS, *SHAPE)).astype(np.float32)
GAIN = np.linspace(0.3, 0.9, 2, dtype=np.float32)


@jax.jit
def ours(table, clip):
    def network(x, t, conditioning):
        phase = jnp.cos(t / 100)[:, None, None, None]
        return jnp.tanh(x * GAIN[None, None, None]) + 0.1 * phase

    denoise = make_denoiser(network, Conditioning(), clip=clip)
    return sample(denoise, jnp.asarray(START), table, given_noise(NOISE))


def config_of(schedule: ScheduleConfig) -> dict:
    """What a folder's scheduler_config.json would say."""
    data = dataclasses.asdict(schedule)
    return {key: value for key, value in data.items() if value is not None}


class Brownian:
    """The noise of diffusers' SDE solver, from one unit draw for each of its calls."""

    def __init__(self, draws):
        self.draws = draws
        self.past = None

    def __call__(self, start, end):
        new = next(self.draws)
        if self.past is None:
            self.past = (start, end, new)
            return new
        _, middle, old = self.past
        self.past = None
        first, second = start - middle, middle - end
        total = (first + second) ** 0.5
        return (first**0.5 * old + second**0.5 * new) / total


def scheduler_class(name, monkeypatch):
    if name != "dpmpp_sde":
        return getattr(diffusers, CLASSES[name])
    # Its module imports torchsde for noise that is handed in here.
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    return module.DPMSolverSDEScheduler


def theirs(name, schedule, steps, monkeypatch, **arguments):
    base = name.removesuffix("_karras").removesuffix("_exponential")
    options = dict(OPTIONS.get(base, {}))
    options["use_karras_sigmas"] = name.endswith("_karras")
    options["use_exponential_sigmas"] = name.endswith("_exponential")
    cls = scheduler_class(base, monkeypatch)
    known = inspect.signature(cls).parameters
    options = {key: value for key, value in options.items() if key in known}
    data = {k: v for k, v in config_of(schedule).items() if k in known}
    scheduler = cls.from_config({**data, **options})
    scheduler.set_timesteps(steps)
    row = iter(range(MIN_ROWS))
    now = [0]
    draw = lambda *_, **__: torch.from_numpy(NOISE[now[0]])
    module = inspect.getmodule(cls)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", draw)
    if base == "dpmpp_sde":
        scheduler.noise_sampler = Brownian(iter(lambda: draw(), None))
    x = torch.from_numpy(START) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        now[0] = next(row)
        inputs = scheduler.scale_model_input(x, t)
        output = torch.tanh(inputs * torch.from_numpy(GAIN))
        output = output + 0.1 * np.cos(float(np.float32(t)) / 100)
        x = scheduler.step(output.float(), t, x, **arguments).prev_sample
    return x.numpy()


def check(name, schedule, steps, monkeypatch, tolerance=2e-5, **arguments):
    clip = clip_range(schedule, name) or np.inf
    expected = theirs(name, schedule, steps, monkeypatch, **arguments)
    table = tableau(schedule, name, steps, eta=arguments.get("eta"))
    x = ours(table, np.float32(clip))
    np.testing.assert_allclose(
        x,
        expected,
        rtol=0,
        atol=tolerance * np.abs(expected).max(),
        err_msg=f"{name}, {steps} steps, {schedule}",
    )


def names():
    for name in CLASSES:
        yield name
        # diffusers has no such levels for Euler ancestral.
        if SAMPLERS[name].takes_levels and name != "euler_a":
            yield name + "_karras"
            yield name + "_exponential"


@pytest.mark.parametrize("name", list(names()))
def test_sampler_equals_its_scheduler(name, monkeypatch):
    # Its float32 loses digits in the lower level, √(σ'² − σ_up²), of few steps.
    tolerance = 1e-4 if name.startswith("dpm2_a") else 2e-5
    for spacing, prediction, steps in itertools.product(SPACINGS, PREDICTIONS, STEPS):
        if name == "pndm_prk" and steps < 4:
            continue
        if name.startswith("deis_") and steps == 1:
            continue  # theirs stays at the noise
        schedule = ScheduleConfig(
            timestep_spacing=spacing, steps_offset=1, prediction_type=prediction
        )
        check(name, schedule, steps, monkeypatch, tolerance)


@pytest.mark.parametrize("name", CLASSES)
def test_absent_keys_have_the_defaults_of_the_scheduler(name, monkeypatch):
    check(name, ScheduleConfig(), 10, monkeypatch, 1e-4)


@pytest.mark.parametrize("kind", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "unipc"])
def test_other_betas(name, kind, monkeypatch):
    check(name, ScheduleConfig(beta_schedule=kind), 10, monkeypatch, 1e-4)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "plms", "tcd"])
@pytest.mark.parametrize("end", [True, False])
def test_final_alpha(name, end, monkeypatch):
    check(name, ScheduleConfig(set_alpha_to_one=end), 10, monkeypatch)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m", "unipc"])
def test_prediction_of_x0(name, monkeypatch):
    check(name, ScheduleConfig(prediction_type="sample"), 10, monkeypatch)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m"])
def test_zero_terminal_snr(name, monkeypatch):
    schedule = ScheduleConfig(
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    check(name, schedule, 10, monkeypatch, 1e-4)


@pytest.mark.parametrize("name", ["ddim", "tcd"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_eta(name, eta, monkeypatch):
    check(name, ScheduleConfig(), 8, monkeypatch, eta=eta)


@pytest.mark.parametrize("name", ["ddpm", "lcm", "heun", "euler"])
def test_clip_sample(name, monkeypatch):
    schedule = ScheduleConfig(clip_sample=True, clip_sample_range=0.7)
    check(name, schedule, 8, monkeypatch)
