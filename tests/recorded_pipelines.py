"""The cases that scripts/record_pipelines.py records and the test draws again."""

import itertools
import pathlib

import numpy as np
from tiny import SD1, SD2, SDXL

PATH = pathlib.Path(__file__).parent / "recorded" / "pipelines.npz"
FAMILIES = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
PROMPTS = {
    "prompt": ["a red fox", "Two Blue foxes!"],
    "negative_prompt": ["blurry", "ugly, bad"],
}
GUIDANCE = [(1.0, 0.0), (7.5, 0.0), (7.5, 0.7)]
STEPS = 5
CASES = [
    (sampler, scale, rescale, STEPS)
    for sampler, (scale, rescale) in itertools.product(SCHEDULERS, GUIDANCE)
]


def case_name(family, sampler, scale, rescale, steps):
    return f"{family} {sampler} {scale} {rescale} {steps}"


def noise(steps):
    """Starting noise, and what each row of a sampler may add."""
    random = np.random.default_rng(0)
    draws = random.standard_normal((1 + 2 * steps, 2, 8, 8, 4)).astype(np.float32)
    return draws[0], draws[1:]
