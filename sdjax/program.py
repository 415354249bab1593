"""Text to image as one pure function: token ids in, pixels out.

`sample` composes a text encoder, guidance, a sampler and the decoder. Whoever jits it
gets one XLA program, whose prompt, negative prompt, seed, guidance scale, sampler,
number of steps and η are inputs: changing them compiles nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from sdjax.config import ModelConfig
from sdjax.diffusion import (
    Tableau,
    given_noise,
    guide,
    initial_noise,
    keyed_noise,
    make_denoiser,
)
from sdjax.diffusion import sample as run_sampler
from sdjax.models import Autoencoder, UNet
from sdjax.models.layers import guidance_embedding
from sdjax.text_conditioning import encode_tokens, size_vector
from sdjax.typing import Conditioning, Latent, Network, Params, Tokens

OutputType = Literal["uint8", "float", "latent"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What a compiled program is fixed to, besides the batch size.

    Attributes:
        height, width: of the image, in pixels.
        dtype: the networks compute in it; schedules, norms, softmax stay float32.
        clip_skip: text layers to leave out beyond the model's own choice.
        output_type: "uint8", "float" in [0, 1], or "latent" (before the decoder).
    """

    model: ModelConfig
    height: int
    width: int
    dtype: Dtype = "float32"
    clip_skip: int = 0
    output_type: OutputType = "uint8"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one latent."""
        factor = self.model.vae.downsample_factor
        channels = self.model.vae.latent_channels
        return self.height // factor, self.width // factor, channels


class SampleInputs(NamedTuple):
    """What a compiled program is given; B images. From the host, numpy arrays serve.

    Attributes:
        tokens: ids per text tower ("text_encoder", "text_encoder_2"), [B, L] each.
        negative_tokens: the same for the negative prompt; None: no guidance at all,
            and half the work.
        negative_is_zero: 1 where the unconditional states are zeros, not those of
            the negative prompt (SDXL without a negative prompt).
        key: the run's root key, typed or as its two uint32 words.
        image_indices: image i draws from fold_in(key, i).
        tableau: the sampler's coefficients, from `sdjax.diffusion.tableau`.
        clip: limit of |x0|; inf is off.
        guidance_scale: 1 is the conditional prediction alone.
        guidance_rescale: φ of Lin et al. 2023, eq. 16; 0 is off.
        size: original height and width, crop top and left, target height and width
            (SDXL); the refiner has an aesthetic score in place of the last two.
        negative_size: the same for the unconditional half.
        latents: start from this unit-variance noise instead of the key's.
        noise: what each row of the tableau adds, instead of the key's,
            [rows, B, h, w, C].
    """

    tokens: dict[str, Tokens]
    negative_tokens: dict[str, Tokens] | None
    negative_is_zero: Float[Array, " b"] | None
    key: Shaped[Array, "..."]
    image_indices: Int[Array, " b"]
    tableau: Tableau
    clip: Float[Array, ""]
    guidance_scale: Float[Array, " b"]
    guidance_rescale: Float[Array, " b"]
    size: Float[Array, "b n"] | None = None
    negative_size: Float[Array, "b n"] | None = None
    latents: Latent | None = None
    noise: Float[Array, "rows b h w c"] | None = None


OnStep = Callable[[Int[Array, ""]], Shaped[Array, ""]]


def sample(
    params: Params,
    inputs: SampleInputs,
    *,
    config: SampleConfig,
    on_step: OnStep | None = None,
) -> Shaped[Array, "b height width c"]:
    """Draws images; pure, for use inside jit, vmap, grad, shard_map or pmap.

    Differentiable with respect to its inputs where the tableau is unpadded
    (`sdjax.prepare(..., pad=False)`).

    Args:
        params: the model's, by component.
        inputs: see `SampleInputs` and `sdjax.prepare`.
        config: static.
        on_step: called inside the loop with the number of steps done; returns whether
            to stop there.

    Returns:
        Images [B, height, width, 3], or latents [B, h, w, C] already multiplied by
        the autoencoder's scaling factor.
    """
    precision = "highest" if config.dtype == "float32" else None
    with jax.default_matmul_precision(precision):
        x = _sample_latents(params, inputs, config, on_step)
        if config.output_type == "latent":
            return x
        if on_step is None:
            return _decode(params, x, config)
        stopped = on_step(jnp.int32(-1))  # nothing new, but whether to stop
        decode = functools.partial(_decode, params, config=config)
        blank = jax.eval_shape(decode, x)
        return jax.lax.cond(
            stopped, lambda x: jnp.zeros(blank.shape, blank.dtype), decode, x
        )


def _sample_latents(
    params: Params, inputs: SampleInputs, config: SampleConfig, on_step: OnStep | None
) -> Latent:
    keys = _image_keys(inputs)
    shape = config.latent_shape
    x = initial_noise(keys, shape) if inputs.latents is None else inputs.latents
    noise = (
        keyed_noise(keys, shape) if inputs.noise is None else given_noise(inputs.noise)
    )
    network = _unet(params, config)
    conditioning, unconditional = encode_text(params, inputs, config)
    if unconditional is not None:
        network = guide(
            network, unconditional, inputs.guidance_scale, inputs.guidance_rescale
        )
    denoise = make_denoiser(network, conditioning, clip=inputs.clip)
    on_row = None
    if on_step is not None:
        on_row = lambda row, step: on_step(_steps_done(inputs.tableau, row, step))
    return run_sampler(denoise, x, inputs.tableau, noise, on_step=on_row)


def _steps_done(
    tableau: Tableau, row: Int[Array, ""], step: Int[Array, ""]
) -> Int[Array, ""]:
    """Steps completed after a row: a step of several rows ends with its last."""
    steps = jnp.asarray(tableau.step)
    count = len(steps) if tableau.num_rows is None else tableau.num_rows
    following = steps[jnp.minimum(row + 1, len(steps) - 1)]
    return jnp.where(row + 1 < count, following, step + 1)


def _image_keys(inputs: SampleInputs) -> Shaped[Array, " b"]:
    key = inputs.key
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(inputs.image_indices)


def _unet(params: Params, config: SampleConfig) -> Network:
    unet = UNet(config.model.unet, dtype=jnp.dtype(config.dtype))

    def network(x: Latent, t: Float[Array, " b"], conditioning: Conditioning) -> Latent:
        variables = {"params": params["unet"]}
        return cast(Latent, unet.apply(variables, x, t, conditioning))

    return network


def encode_text(
    params: Params, inputs: SampleInputs, config: SampleConfig
) -> tuple[Conditioning, Conditioning | None]:
    """Runs the text towers once over both prompts.

    Returns:
        The conditioning of the prompt, and that of the negative prompt where there
        is one.
    """
    if inputs.negative_tokens is None:
        context, pooled = _encode(params, inputs.tokens, config, config.clip_skip)
        return _conditioning(context, pooled, inputs.size, inputs, config), None
    if config.clip_skip == 0:
        both = jax.tree.map(
            lambda *prompts: jnp.concatenate(prompts),
            inputs.negative_tokens,
            inputs.tokens,
        )
        context, pooled = _encode(params, both, config, 0)  # [2B, L, D], [2B, E]
        negative, positive = jnp.split(context, 2)
        negative_pooled, pooled = jnp.split(pooled, 2)
    else:  # as in diffusers, it skips layers for the prompt alone
        negative, negative_pooled = _encode(params, inputs.negative_tokens, config, 0)
        positive, pooled = _encode(params, inputs.tokens, config, config.clip_skip)
    if inputs.negative_is_zero is not None:
        keep = (1 - inputs.negative_is_zero).astype(negative.dtype)
        negative = negative * keep[:, None, None]
        negative_pooled = negative_pooled * keep[:, None]
    return (
        _conditioning(positive, pooled, inputs.size, inputs, config),
        _conditioning(negative, negative_pooled, inputs.negative_size, inputs, config),
    )


def _encode(
    params: Params, tokens: dict[str, Tokens], config: SampleConfig, clip_skip: int
) -> tuple[Float[Array, "b l d"], Float[Array, "b e"]]:
    return encode_tokens(
        params, tokens, config.model, dtype=config.dtype, clip_skip=clip_skip
    )


def _conditioning(context, pooled, size, inputs, config) -> Conditioning:
    """Adds what SDXL (image sizes) and LCM (guidance) want besides the text."""
    vector = guidance = None
    if config.model.unet.vector == "add_embedding":
        vector = size_vector(pooled, size)
    if config.model.unet.guidance_dim is not None:
        w = inputs.guidance_scale - 1  # Luo et al. 2023 count from no guidance
        guidance = guidance_embedding(w, config.model.unet.guidance_dim)
    return Conditioning(context=context, vector=vector, guidance=guidance)


def _decode(params: Params, x: Latent, config: SampleConfig) -> Shaped[Array, "..."]:
    """Latents to images; never in float16, which overflows in SDXL's decoder."""
    dtype = "float32" if config.dtype == "float16" else config.dtype
    vae = Autoencoder(config.model.vae, dtype=jnp.dtype(dtype))
    x = x / config.model.vae.scaling_factor
    images = cast(Array, vae.apply({"params": params["vae"]}, x, method="decode"))
    images = jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)
    if config.output_type == "float":
        return images
    return jnp.round(images * 255).astype(jnp.uint8)
