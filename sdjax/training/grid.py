"""Pictures drawn on the way, for people to look at: one sheet each time."""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from sdjax.config import AutoencoderConfig
from sdjax.model import Model
from sdjax.models import Autoencoder, Posterior
from sdjax.pipeline import generate
from sdjax.sheet import Pictures, Sheet, tile
from sdjax.training.config import TrainConfig
from sdjax.typing import Params

MOST_RECONSTRUCTIONS = 8


def draw_prompts(config: TrainConfig, model: Model, mesh: Mesh) -> Sheet:
    """One picture of each of `config.samples.prompts`, with the run's seed."""
    samples = config.samples
    images = generate(
        list(samples.prompts),
        model=model,
        num_inference_steps=samples.num_inference_steps,
        guidance_scale=samples.guidance_scale,
        sampler=samples.sampler,
        seed=config.seed,
        dtype=config.dtype,
        mesh=mesh,
        progress=False,
    )
    return tile(images, math.ceil(math.sqrt(len(images))))


def draw_reconstructions(config: TrainConfig, vae: Params, images: Pictures) -> Sheet:
    """The first pictures of a batch above what the autoencoder makes of them."""
    images = images[:MOST_RECONSTRUCTIONS]
    made = _reconstruct(vae, images, config=config.model.vae, dtype=config.dtype)
    return tile(np.concatenate([images, np.asarray(made)]), len(images))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _reconstruct(
    vae: Params, images: Any, *, config: AutoencoderConfig, dtype: str
) -> Array:
    """Decodes the means of the posteriors; uint8."""
    module = Autoencoder(config, dtype=jnp.dtype(dtype))
    x = images.astype(jnp.float32) / 127.5 - 1
    posterior = module.apply({"params": vae}, x, method="encode")
    mean = cast(Posterior, posterior).mean
    made = cast(Array, module.apply({"params": vae}, mean, method="decode"))
    levels = jnp.round((made.astype(jnp.float32) + 1) * 127.5)
    return jnp.clip(levels, 0, 255).astype(jnp.uint8)
