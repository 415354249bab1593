"""What diffusers drew, recorded, against what sdjax draws: no torch needed."""

import numpy as np
import pytest
from recorded_pipelines import CASES, FAMILIES, PATH, PROMPTS, case_name, noise
from tiny import numpy_model

import sdjax
from sdjax import runner


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_those_of_diffusers(family):
    model = numpy_model(FAMILIES[family])
    with np.load(PATH) as recorded:
        for sampler, scale, rescale, steps in CASES:
            latents, extra = noise(steps)
            inputs, config = sdjax.prepare(
                model=model,
                latents=latents,
                guidance_scale=scale,
                guidance_rescale=rescale,
                num_inference_steps=steps,
                sampler=sampler,
                output_type="latent",
                **PROMPTS,
            )
            rows = np.zeros((1024, *extra.shape[1:]), np.float32)
            rows[: len(extra)] = extra
            got = runner.run(model, inputs._replace(noise=rows), config)
            name = case_name(family, sampler, scale, rescale, steps)
            error = np.max(np.abs(got - recorded[name]))
            assert error <= 1e-4 * np.max(np.abs(recorded[name])), name
