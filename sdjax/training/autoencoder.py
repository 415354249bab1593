"""One step of training the autoencoder: the first phase of latent diffusion.

Rombach et al. 2022, section 3.1, arXiv:2112.10752; Esser et al. 2021, section 3.2,
arXiv:2012.09841. The autoencoder learns against the discriminator as it is, then the
discriminator from the same pictures. That is the original's order, except that it runs
the autoencoder again for the discriminator, just updated and with new noise; here the
discriminator learns from the reconstructions that are there, a third less work.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sdjax.errors import SdjaxError
from sdjax.models.discriminator import init_discriminator
from sdjax.training.autoencoder_gradient import autoencoder_gradients
from sdjax.training.config import TrainConfig
from sdjax.training.optimizer import learning_rate, make_optimizer, updates_done
from sdjax.training.state import TrainState, apply_gradients, make_state
from sdjax.typing import Image, Latent, Params, PRNGKey
from sdjax.weights.lpips_file import read_lpips

Batch = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Batch, PRNGKey], tuple[TrainState, Metrics]]


def make_train_step(config: TrainConfig) -> TrainStep:
    """The step as a pure function (state, batch, key) -> (state, metrics).

    `batch["image"]` is uint8 [B, H, W, C]. Metrics: "loss" is the autoencoder's, of
    the parts "reconstruction" (pixels and LPIPS), "kl" or "codebook" (before their
    weight) and "adversarial"; "pixel" and "perceptual" are per element and picture;
    "discriminator_loss" is the other network's; gradients' norms are before clipping.
    Where one of them is not finite, "finite" is 0 and only `step` moves. Under `jit`
    with a sharded batch it is the step of the whole batch.

    Raises (the step, when it is traced):
        SdjaxError: if the batch is not one that `config` can learn from.
    """
    optimizer = _optimizer(config)
    rate = learning_rate(config.optimizer, config.steps)
    precision = "highest" if config.dtype == "float32" else None

    def train_step(
        state: TrainState, batch: Batch, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        images = _images(batch)
        noise = posterior_noise(key, state.step, images.shape, config)
        with jax.default_matmul_precision(precision):
            gradients, metrics = autoencoder_gradients(
                state.params,
                state.frozen,
                images,
                noise,
                step=state.step,
                config=config,
            )
        norm = optax.tree.norm(gradients["vae"])
        metrics = metrics | {"grad_norm": norm}
        if "discriminator" in gradients:
            norm = optax.tree.norm(gradients["discriminator"])
            metrics |= {"discriminator_grad_norm": norm}
        finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
        finite = finite.astype(jnp.float32)
        metrics |= {
            "learning_rate": jnp.float32(rate(updates_done(state.opt_state))),
            "finite": finite,
        }
        state = apply_gradients(
            state, gradients, optimizer, finite=finite, ema_decay=config.ema_decay
        )
        return state, metrics

    return train_step


def init_state(config: TrainConfig, params: Params) -> TrainState:
    """The state before the first step, from a model's parameters by component.

    What learns is "vae" and, unless its weight is 0, "discriminator", which is drawn
    from the run's seed where `params` lacks it. What does not is "lpips", read from
    `perceptual_path` where `params` lacks it. Other components are left out.

    Raises:
        SdjaxError: if LPIPS's weights cannot be read, or do not fit the pictures.
    """
    settings, vae = config.autoencoder, config.model.vae
    learning = {"vae": params["vae"]}
    if settings.discriminator_weight:
        learning["discriminator"] = params.get("discriminator") or init_discriminator(
            config.seed,
            num_layers=settings.discriminator_layers,
            image_channels=vae.in_channels,
        )
    frozen = {}
    if settings.perceptual_path is not None and settings.perceptual_weight:
        if vae.in_channels != 3:
            raise SdjaxError(
                "autoencoder.perceptual_path is given, but LPIPS compares pictures of "
                f"3 channels and model.vae.in_channels is {vae.in_channels}"
            )
        frozen["lpips"] = params.get("lpips") or read_lpips(settings.perceptual_path)
    keep_ema = config.ema_decay is not None
    return make_state(learning, frozen, _optimizer(config), keep_ema=keep_ema)


def posterior_noise(
    key: PRNGKey, step: Int[Array, ""], shape: tuple[int, ...], config: TrainConfig
) -> Latent:
    """Where in its posterior each latent of a step lies, for images of `shape`.

    Drawn for the whole batch, so that accumulation does not change it.

    Raises:
        SdjaxError: if the images do not divide into latents.
    """
    B, H, W, _ = shape
    factor = config.model.vae.downsample_factor
    if H % factor or W % factor:
        raise SdjaxError(
            f"pictures are {H}×{W}, but the autoencoder divides sides by {factor}: "
            f"data.resolution must be a multiple of {factor}"
        )
    latent = (B, H // factor, W // factor, config.model.vae.latent_channels)
    return jax.random.normal(jax.random.fold_in(key, step), latent)


def _images(batch: Batch) -> Image:
    """The pictures of a batch in [−1, 1]."""
    if "image" not in batch:
        raise SdjaxError(
            "an autoencoder learns from pictures: the batch needs 'image', and has "
            f"{', '.join(batch)}"
        )
    if batch["image"].dtype != jnp.uint8:
        raise SdjaxError(
            f"batch['image'] is {batch['image'].dtype}, but must be uint8 in [0, 255]"
        )
    return batch["image"].astype(jnp.float32) / 127.5 - 1


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Two optimizers, one for each network: states and clipped norms of their own."""
    each = make_optimizer(config.optimizer, config.steps)

    def init(params: Any) -> Any:
        return {name: each.init(tree) for name, tree in params.items()}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new = {
            name: each.update(updates[name], state[name], params[name])
            for name in updates
        }
        return {n: u for n, (u, _) in new.items()}, {n: s for n, (_, s) in new.items()}

    return optax.GradientTransformation(init, update)
