"""The scale factor: what brings an autoencoder's latents to unit deviation.

Rombach et al. 2022, appendix G, arXiv:2112.10752.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.errors import SdjaxError
from sdjax.models import Autoencoder, Posterior
from sdjax.training.config import TrainConfig
from sdjax.typing import Latent, Params, PRNGKey


def measure_scaling_factor(
    params: Params, batches: Iterable[dict[str, Any]], config: TrainConfig
) -> float:
    """Gives 1/deviation of all latents, about their common mean.

    Latents are drawn from their posteriors with the run's seed; of a VQ autoencoder
    they are those before the codebook, which diffusion models learn. Sums are float64.

    Args:
        params: with "vae".
        batches: with "image", uint8 [B, H, W, C]; enough of them to be typical.
        config: of the run.

    Raises:
        SdjaxError: if there is no batch, or the latents do not vary.
    """
    module = Autoencoder(config.model.vae, jnp.dtype(config.dtype))

    @jax.jit
    def draw(vae: Params, images: jax.Array, key: PRNGKey) -> Latent:
        images = images.astype(jnp.float32) / 127.5 - 1
        posterior = module.apply({"params": vae}, images, method="encode")
        return cast(Posterior, posterior).sample(key)

    root = jax.random.key(config.seed)
    count, mean, squares = 0, 0.0, 0.0
    for i, batch in enumerate(batches):
        z = draw(params["vae"], batch["image"], jax.random.fold_in(root, i))
        values = np.asarray(z, np.float64)
        # Chan et al. 1983: sums about a mean that moves, so that no digits cancel.
        shift = values.mean() - mean
        total = count + values.size
        squares += np.square(values - values.mean()).sum()
        squares += shift**2 * count * values.size / total
        mean += shift * values.size / total
        count = total
    if not count:
        raise SdjaxError("the scale factor needs at least one batch of pictures")
    deviation = math.sqrt(squares / count)
    if not 0 < deviation < math.inf:
        raise SdjaxError(
            f"the latents have the deviation {deviation}: no factor can bring it to 1"
        )
    return 1 / deviation


def with_scaling_factor(config: TrainConfig, factor: float) -> TrainConfig:
    """The same run, whose model scales latents by `factor`."""
    vae = dataclasses.replace(config.model.vae, scaling_factor=factor)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vae=vae))
