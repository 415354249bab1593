"""One step of training the diffusion model: the second phase of latent diffusion.

Rombach et al. 2022, eq. 2 and 3, arXiv:2112.10752: latents of the frozen autoencoder
are noised to a random time, and the U-Net learns to tell the noise, or v, or x0. All
that chance decides is drawn for the whole batch, before anything is worked on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from sdjax.diffusion import add_noise, alpha_bars
from sdjax.diffusion.loss import distance, min_snr_weights, prediction_target
from sdjax.errors import SdjaxError
from sdjax.models import Autoencoder, Posterior, UNet
from sdjax.training.accumulation import mean_gradients
from sdjax.training.conditioning import check_batch, condition
from sdjax.training.config import TrainConfig
from sdjax.training.optimizer import learning_rate, make_optimizer, updates_done
from sdjax.training.state import TrainState, apply_gradients, make_state
from sdjax.typing import Latent, Params, PRNGKey

Batch = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Batch, PRNGKey], tuple[TrainState, Metrics]]

DRAWN = ("time", "noise", "posterior", "offset", "perturbation", "label")
"""Each is drawn with fold_in(a step's key, its place in this list)."""


class Draws(NamedTuple):
    """What chance decides in a step; a row for each picture.

    Attributes:
        t: times in [0, T).
        eps: the noise, that common to a channel included: what ε-prediction predicts.
        perturbation: what the network's input gets besides, unit variance; None: off.
        posterior: where in its posterior a latent lies, unit variance.
        unlabelled: whose label is replaced by the unconditional one; None: off.
    """

    t: Int[Array, " b"]
    eps: Latent
    perturbation: Latent | None
    posterior: Latent
    unlabelled: Bool[Array, " b"] | None


def make_train_step(config: TrainConfig) -> TrainStep:
    """The step as a pure function (state, batch, key) -> (state, metrics).

    `key` is the run's root key: a step draws from fold_in(key, state.step). Where the
    loss or its gradient is not finite, "finite" is 0 and only `step` moves. Under
    `jit` with a sharded batch it is the step of the whole batch. Metrics are float32
    scalars: "loss", "grad_norm" (before clipping), "learning_rate" (of this update;
    the U-Net's) and "finite".

    Raises (the step, when it is traced):
        SdjaxError: if the batch is not one that `config` can learn from.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    rate = learning_rate(config.optimizer, config.steps)

    def train_step(
        state: TrainState, batch: Batch, key: PRNGKey
    ) -> tuple[TrainState, Metrics]:
        draws = draw(jax.random.fold_in(key, state.step), batch, config)

        def loss_of(params: Params, rows: tuple[Batch, Draws]) -> Float[Array, ""]:
            return diffusion_loss(params, state.frozen, *rows, config)

        parts = config.optimizer.accumulation
        loss, gradients = mean_gradients(loss_of, state.params, (batch, draws), parts)
        norm = optax.tree.norm(gradients)
        finite = (jnp.isfinite(loss) & jnp.isfinite(norm)).astype(jnp.float32)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": jnp.float32(rate(updates_done(state.opt_state))),
            "finite": finite,
        }
        state = apply_gradients(
            state, gradients, optimizer, finite=finite, ema_decay=config.ema_decay
        )
        return state, metrics

    return train_step


def init_state(config: TrainConfig, params: Params) -> TrainState:
    """The state before the first step, from all of a model's parameters.

    What learns is "unet", "class_embedder" where there is one, and the text towers
    where the config says so; every other component given is kept as it is. The
    autoencoder or the text towers may be left out where a cache stands in for them.

    Raises:
        SdjaxError: if a component that should learn is missing.
    """
    learning = {"unet"}
    if config.model.class_embedder is not None:
        learning.add("class_embedder")
    if config.diffusion.train_text_encoder:
        learning |= set(config.model.text_encoders) or {"text_encoder"}
    for name in sorted(learning - set(params)):
        raise SdjaxError(
            f"the parameters have no {name!r}, which is to learn; they have "
            f"{', '.join(sorted(params))}"
        )
    return make_state(
        {name: tree for name, tree in params.items() if name in learning},
        {name: tree for name, tree in params.items() if name not in learning},
        make_optimizer(config.optimizer, config.steps),
        keep_ema=config.ema_decay is not None,
    )


def draw(key: PRNGKey, batch: Batch, config: TrainConfig) -> Draws:
    """Draws a batch's times, its noise, and where in its posterior each latent lies.

    `key` is a step's own, fold_in(the run's root key, step). Offset noise is that of
    N. Guttenberg 2023 ("Diffusion with Offset Noise"), input perturbation that of Ning
    et al. 2023, arXiv:2301.11706.

    Raises:
        SdjaxError: if the batch holds no pictures or moments of the right shape.
    """
    settings, shape = config.diffusion, _latent_shape(batch, config)
    B, _, _, C = shape
    keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(DRAWN)}
    steps = config.model.schedule.num_train_timesteps
    eps = jax.random.normal(keys["noise"], shape)
    if settings.offset_noise:
        offset = jax.random.normal(keys["offset"], (B, 1, 1, C))
        eps += settings.offset_noise * offset
    perturbation = unlabelled = None
    if settings.input_perturbation:
        perturbation = jax.random.normal(keys["perturbation"], shape)
    if settings.label_dropout and "label" in batch:
        unlabelled = jax.random.bernoulli(keys["label"], settings.label_dropout, (B,))
    return Draws(
        t=jax.random.randint(keys["time"], (B,), 0, steps),
        eps=eps,
        perturbation=perturbation,
        posterior=jax.random.normal(keys["posterior"], shape),
        unlabelled=unlabelled,
    )


def diffusion_loss(
    params: Params, frozen: Params, batch: Batch, draws: Draws, config: TrainConfig
) -> Float[Array, ""]:
    """The mean loss over a batch; `params` and `frozen` make up the whole model.

    Raises:
        SdjaxError: if the batch lacks what the model is conditioned on, or holds what
            it does not take.
    """
    check_batch(batch, config)
    with jax.default_matmul_precision("highest" if config.dtype == "float32" else None):
        everything = {**frozen, **params}
        schedule = config.model.schedule
        alpha_bar = alpha_bars(schedule)
        x0 = _latents(everything, batch, draws.posterior, config)
        noise = draws.eps
        if draws.perturbation is not None:
            noise += config.diffusion.input_perturbation * draws.perturbation
        unet = UNet(
            config.model.unet, dtype=jnp.dtype(config.dtype), remat=config.remat
        )
        prediction = unet.apply(
            {"params": everything["unet"]},
            add_noise(x0, noise, draws.t, alpha_bar),
            draws.t.astype(jnp.float32),
            condition(everything, batch, draws.unlabelled, config),
        )
    target = prediction_target(
        x0, draws.eps, draws.t, alpha_bar, schedule.prediction_type
    )
    losses = _weighted(cast(Array, prediction), target, draws.t, alpha_bar, config)
    return losses.mean()


def _weighted(
    prediction: Latent,
    target: Latent,
    t: Int[Array, " b"],
    alpha_bar: Float[np.ndarray, " t"],
    config: TrainConfig,
) -> Float[Array, " b"]:
    settings = config.diffusion
    losses = distance(prediction, target, settings.loss, settings.huber_c)
    if settings.min_snr_gamma is None:
        return losses
    weights = min_snr_weights(
        alpha_bar, config.model.schedule.prediction_type, settings.min_snr_gamma
    )
    return losses * jnp.asarray(weights, jnp.float32)[t]


def _latents(
    params: Params, batch: Batch, posterior: Latent, config: TrainConfig
) -> Latent:
    """Latents of unit variance or so: samples of the posterior × scaling_factor."""
    if "moments" in batch:
        mean, logvar = jnp.split(batch["moments"], 2, axis=-1)
    else:
        vae = Autoencoder(config.model.vae, dtype=jnp.dtype(config.dtype))
        images = batch["image"].astype(jnp.float32) / 127.5 - 1
        encoded = vae.apply({"params": params["vae"]}, images, method="encode")
        mean, logvar = cast(Posterior, encoded)
    z = mean + jnp.exp(0.5 * logvar) * posterior
    return config.model.vae.scaling_factor * z


def _latent_shape(batch: Batch, config: TrainConfig) -> tuple[int, int, int, int]:
    vae = config.model.vae
    C, factor = vae.latent_channels, vae.downsample_factor
    if "moments" in batch:
        B, H, W, channels = batch["moments"].shape
        if channels != 2 * C:
            raise SdjaxError(
                f"moments have {channels} channels, but the autoencoder's latents have "
                f"{C}: a mean and a log variance each make {2 * C}"
            )
        return B, H, W, C
    if "image" not in batch:
        raise SdjaxError(
            f"a batch needs 'image' or 'moments'; this one has {', '.join(batch)}"
        )
    B, H, W, _ = batch["image"].shape
    if batch["image"].dtype != jnp.uint8:
        raise SdjaxError(
            f"batch['image'] is {batch['image'].dtype}, but must be uint8 in [0, 255]"
        )
    if H % factor or W % factor:
        raise SdjaxError(
            f"pictures are {H}×{W}, but the autoencoder divides sides by {factor}: "
            f"data.resolution must be a multiple of {factor}"
        )
    return B, H // factor, W // factor, C
