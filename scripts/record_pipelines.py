"""Records what diffusers draws with small models, for machines without torch.

    python scripts/record_pipelines.py

Needs the `parity` extra. The weights are drawn by numpy from the parameters' names
and reach diffusers through the folder that sdjax writes; only latents are recorded,
in tests/recorded/pipelines.npz, which tests/test_recorded_pipelines.py reads.
"""

import pathlib
import sys
import tempfile

import diffusers
import numpy as np
import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from recorded_pipelines import (  # noqa: E402
    CASES,
    FAMILIES,
    PATH,
    PROMPTS,
    SCHEDULERS,
    case_name,
    noise,
)
from tiny import numpy_model  # noqa: E402

import sdjax  # noqa: E402


def draw(pipe, family, scheduler, guidance, rescale, steps):
    name, changes = SCHEDULERS[scheduler]
    config = {k: v for k, v in pipe.published.items() if k != "_class_name"}
    pipe.scheduler = getattr(diffusers, name).from_config(config | changes)
    latents, extra = noise(steps)
    draws = iter(torch.from_numpy(np.moveaxis(extra, -1, 2).copy()))
    module = sys.modules[type(pipe.scheduler).__module__]
    module.randn_tensor = lambda *_, **__: next(draws).clone()
    with torch.no_grad():
        return pipe(
            latents=torch.from_numpy(np.moveaxis(latents, -1, 1).copy()),
            guidance_scale=guidance,
            guidance_rescale=rescale,
            num_inference_steps=steps,
            height=64,
            width=64,
            output_type="latent",
            **PROMPTS,
        ).images.numpy()


def main() -> None:
    results = {}
    for family, config in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = pathlib.Path(folder) / "model"
            sdjax.save(numpy_model(config), model)
            pipe = diffusers.DiffusionPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
        pipe.published = {
            "beta_start": config.schedule.beta_start,
            "beta_end": config.schedule.beta_end,
            "beta_schedule": config.schedule.beta_schedule,
            "prediction_type": config.schedule.prediction_type,
            "steps_offset": config.schedule.steps_offset,
            "clip_sample": False,
        }
        for case in CASES:
            latents = draw(pipe, family, *case)
            results[case_name(family, *case)] = np.moveaxis(latents, 1, -1)
    np.savez_compressed(PATH, **results)
    print(PATH)


if __name__ == "__main__":
    main()
