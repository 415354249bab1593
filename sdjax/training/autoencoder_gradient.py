"""The gradients of the first stage's objective, all from one pass of the autoencoder.

Everything that the loss asks of a reconstruction x̂ is first a gradient with respect to
x̂; their sum is then pulled back through the autoencoder once:

    ∂x̂/∂θᵀ (∂nll/∂x̂ + λ ∂g/∂x̂).

λ needs two gradients with respect to the kernel of the last convolution, which are
taken from that convolution alone.

A batch worked on in parts gives the same gradients, not only similar ones, although λ
and the discriminator's batch norms are of the whole batch: reconstructions are made in
parts, judged as a whole, and made again in parts to be pulled back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree

from sdjax.models import Autoencoder, Codes, Posterior
from sdjax.models.discriminator import PatchDiscriminator
from sdjax.models.lpips import LPIPS
from sdjax.training.accumulation import split_rows
from sdjax.training.autoencoder_loss import (
    adaptive_weight,
    codebook_loss,
    generator_loss,
    hinge_loss,
    pixel_distance,
)
from sdjax.training.config import TrainConfig
from sdjax.typing import Image, Latent, Params

Scalar = Float[Array, ""]
Metrics = dict[str, Scalar]


class Outputs(NamedTuple):
    """What the loss is made of: reconstructions, and each latent's penalty.

    The penalty is the posterior's divergence in nats, or the codebook's loss.
    """

    images: Image
    penalty: Float[Array, " b"]


class Pass(NamedTuple):
    """A pass of the autoencoder, and the way back.

    Attributes:
        features: what the decoder's last convolution is given.
        pull: from gradients with respect to `outputs` to those of the parameters.
    """

    outputs: Outputs
    features: Float[Array, "b height width d"]
    pull: Callable[[Outputs], Params]


class Adversary(NamedTuple):
    """What the discriminator adds.

    Attributes:
        to_images: gradient of its term in the autoencoder's loss, weighted.
        gradients: of its own parameters, for its own loss.
        metrics: with "adversarial", that weighted term.
    """

    to_images: Image
    gradients: Params
    metrics: Metrics


def autoencoder_gradients(
    params: Params,
    frozen: Params,
    images: Image,
    noise: Latent,
    *,
    step: Int[Array, ""],
    config: TrainConfig,
) -> tuple[Params, Metrics]:
    """Gives the gradients of "vae" and "discriminator", each of its own loss.

    Args:
        params: "vae", and "discriminator" where there is one.
        frozen: "lpips" where there is a perceptual term.
        images: in [−1, 1].
        noise: unit normal; where in its posterior each latent lies.
        step: from 0; the discriminator counts from `discriminator_start` on.
        config: static.

    Returns:
        The gradients, and "loss" with its parts, averages over the batch.
    """
    settings = config.autoencoder
    done = _run(params["vae"], images, noise, config)
    to_images, metrics = _reconstruction(frozen, images, done.outputs.images, config)
    is_kl = config.model.vae.codebook_size is None
    weight = settings.kl_weight if is_kl else settings.codebook_weight
    penalty = done.outputs.penalty.mean()
    metrics["kl" if is_kl else "codebook"] = penalty
    loss = metrics["reconstruction"] + weight * penalty
    gradients = {}
    if "discriminator" in params:
        gate = (step >= settings.discriminator_start).astype(jnp.float32)
        adversary = _judge(params, images, done, to_images, gate, config)
        gradients["discriminator"] = adversary.gradients
        to_images = to_images + adversary.to_images
        loss += adversary.metrics["adversarial"]
        metrics |= adversary.metrics
    to_penalty = jnp.full(len(images), weight / len(images))
    gradients["vae"] = done.pull(Outputs(to_images, to_penalty))
    return gradients, {"loss": loss, **metrics}


def _run(vae: Params, images: Image, noise: Latent, config: TrainConfig) -> Pass:
    """Runs the autoencoder once; in parts, once more on the way back."""
    parts = config.optimizer.accumulation

    def begin(images: Image, noise: Latent) -> tuple[Outputs, Any, Array]:
        reconstruct = lambda vae: _reconstruct(vae, images, noise, config)
        return cast(Any, jax.vjp(reconstruct, vae, has_aux=True))

    if parts == 1:
        outputs, pull, features = begin(images, noise)
        return Pass(outputs, features, lambda outputs: pull(outputs)[0])
    inputs = split_rows((images, noise), parts)
    run = lambda part: _reconstruct(vae, part[0], part[1], config)
    outputs, features = _join(jax.lax.map(run, inputs))

    def pull_parts(to_outputs: Outputs) -> Params:
        def add(total: Params, part: Any) -> tuple[Params, None]:
            images, noise, to_outputs = part
            _, pull, _ = begin(images, noise)
            return jax.tree.map(jnp.add, total, pull(to_outputs)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, vae)
        rows = (*inputs, split_rows(to_outputs, parts))
        return jax.lax.scan(add, zeros, rows)[0]

    return Pass(outputs, features, pull_parts)


def _reconstruct(
    vae: Params, images: Image, noise: Latent, config: TrainConfig
) -> tuple[Outputs, Array]:
    """Encodes, draws or snaps, and decodes; also gives the last feature map."""
    module = Autoencoder(config.model.vae, jnp.dtype(config.dtype), config.remat)
    variables = {"params": vae}
    posterior = cast(Posterior, module.apply(variables, images, method="encode"))
    if config.model.vae.codebook_size is None:
        z = posterior.mean + jnp.exp(0.5 * posterior.logvar) * noise
        penalty = posterior.kl()
    else:
        found = module.apply(variables, posterior.mean, method="nearest_codes")
        z, codes, _ = cast(Codes, found)
        penalty = codebook_loss(posterior.mean, codes)
    decoded, kept = module.apply(
        variables,
        z,
        snap=False,
        method="decode",
        capture_intermediates=lambda module, _: module.name == "conv_norm_out",
        mutable=["intermediates"],
    )
    outputs = Outputs(cast(Array, decoded), penalty)
    (normed,) = cast(Any, kept)["intermediates"]["decoder"]["conv_norm_out"]["__call__"]
    return outputs, nn.silu(normed)


def _reconstruction(
    frozen: Params, images: Image, reconstructions: Image, config: TrainConfig
) -> tuple[Image, Metrics]:
    """The gradient of pixels and LPIPS with respect to the reconstructions."""
    settings, parts = config.autoencoder, config.optimizer.accumulation
    B, H, W, C = images.shape
    scale = H * W * C if settings.reduction == "sum" else 1

    def loss(reconstructions: Image, images: Image) -> tuple[Scalar, Metrics]:
        pixel = pixel_distance(images, reconstructions, settings.pixel)
        metrics = {"pixel": pixel.sum() / B}
        total = pixel
        if "lpips" in frozen:
            lpips = LPIPS(jnp.dtype(config.dtype))
            variables = {"params": frozen["lpips"]}
            # A picture's LPIPS is added to each of its elements, so that "sum"
            # multiplies it, too, by their number.
            perceptual = cast(Array, lpips.apply(variables, images, reconstructions))
            metrics["perceptual"] = perceptual.sum() / B
            total = pixel + settings.perceptual_weight * perceptual
        value = scale * total.sum() / B
        return value, metrics | {"reconstruction": value}

    differentiate = jax.grad(loss, has_aux=True)
    if parts == 1:
        return differentiate(reconstructions, images)
    both = split_rows((reconstructions, images), parts)
    gradients, metrics = jax.lax.map(lambda part: differentiate(*part), both)
    return _join(gradients), jax.tree.map(jnp.sum, metrics)


def _judge(
    params: Params,
    images: Image,
    done: Pass,
    to_images: Image,
    gate: Scalar,
    config: TrainConfig,
) -> Adversary:
    """Runs the discriminator on true pictures and on reconstructions, once each.

    Until `gate` is 1 it has no say and does not learn.
    """
    settings = config.autoencoder
    module = PatchDiscriminator(
        settings.discriminator_layers, dtype=jnp.dtype(config.dtype)
    )
    judge = lambda params, x: cast(Array, module.apply({"params": params}, x))
    learned = params["discriminator"]
    # Apart, as the original does: each has batch statistics of its own.
    real, pull_real = jax.vjp(lambda learned: judge(learned, images), learned)
    fake, pull_fake = jax.vjp(judge, learned, done.outputs.images)
    g, to_fake = jax.value_and_grad(generator_loss)(fake)
    _, g_to_images = pull_fake(to_fake)
    d, (to_real, to_fake) = jax.value_and_grad(hinge_loss, (0, 1))(real, fake)
    from_real, from_fake = pull_real(to_real)[0], pull_fake(to_fake)[0]
    norm = _last_kernel_norm(params["vae"], done.features, config)
    weight = adaptive_weight(
        norm(to_images), norm(g_to_images), settings.discriminator_weight
    )
    metrics = {
        "adversarial": gate * weight * g,
        "adaptive_weight": weight,
        "discriminator_loss": gate * d,
        "logits_real": real.mean(),
        "logits_fake": fake.mean(),
    }
    gradients = jax.tree.map(lambda a, b: gate * (a + b), from_real, from_fake)
    return Adversary(gate * weight * g_to_images, gradients, metrics)


def _last_kernel_norm(
    vae: Params, features: Array, config: TrainConfig
) -> Callable[[Image], Scalar]:
    """From a gradient of the reconstructions to its norm at the last kernel."""
    kernel = vae["decoder"]["conv_out"]["kernel"]
    conv = nn.Conv(
        kernel.shape[-1],
        kernel.shape[:2],
        padding=1,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
    )

    def apply(kernel: Array) -> Array:
        images = conv.apply({"params": {"kernel": kernel}}, features)
        return cast(Array, images).astype(jnp.float32)

    _, pull = jax.vjp(apply, kernel)
    return lambda to_images: optax.tree.norm(pull(to_images)[0])


def _join(tree: PyTree) -> PyTree:
    """Undoes `split_rows`."""
    join = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
    return jax.tree.map(join, tree)
