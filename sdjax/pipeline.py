"""From prompts to pictures: `prepare` makes a program's inputs, `generate` runs it."""

import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
import PIL.Image
from jax.sharding import Mesh
from jaxtyping import Shaped

from sdjax import arguments, diffusion, parallel
from sdjax.config import ScheduleConfig
from sdjax.errors import SdjaxError
from sdjax.model import Model, bundled, load
from sdjax.program import Dtype, OutputType, SampleConfig, SampleInputs
from sdjax.runner import run

DEFAULT_SAMPLER = "dpmpp_2m"
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5

Prompts = str | Sequence[str]


def prepare(
    prompt: Prompts,
    *,
    model: Model,
    negative_prompt: Prompts | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | Literal["model"] | None = "model",
    guidance_rescale: float = 0.0,
    num_images_per_prompt: int = 1,
    sampler: str | None = None,
    eta: float | None = None,
    seed: int = 0,
    key: jax.Array | None = None,
    image_indices: Sequence[int] | None = None,
    latents: Shaped[Any, "b h w c"] | None = None,
    noise: Shaped[Any, "rows b h w c"] | None = None,
    clip_skip: int = 0,
    dtype: Dtype | None = None,
    output_type: Literal["uint8", "float", "latent"] = "uint8",
    pad: bool = True,
) -> tuple[SampleInputs, SampleConfig]:
    """Makes the inputs of `sample` on the host; compiles and computes nothing.

    The arguments are those of `generate`, and `noise`: what each row of the sampler's
    table adds in place of the key's draws, [rows, N, h, w, C]; and `pad`: whether to
    pad that table, so that the number of steps is an input of the program. False
    makes it part of the program, which can then be differentiated.

    Returns:
        Inputs (numpy arrays) and config, for `sample(params, inputs, config=config)`.

    Raises:
        SdjaxError: if an argument is out of range.
    """
    prompts = arguments.prompts(prompt, "prompt", num_images_per_prompt)
    batch = len(prompts)
    config = _config(model, height, width, dtype, clip_skip, output_type)
    schedule = model.config.schedule
    if sampler is None:
        sampler = schedule.sampler or DEFAULT_SAMPLER
    if num_inference_steps is None:
        num_inference_steps = model.config.num_inference_steps
    tableau = _tableau(schedule, sampler, num_inference_steps, eta, pad)
    shape = (batch, *config.latent_shape)
    distilled = model.config.unet.guidance_dim is not None
    guided = guidance_scale is not None and not distilled
    scale = 1.0
    if guidance_scale == "model":
        guidance_scale = model.config.guidance_scale
    if guidance_scale is not None:
        scale = arguments.real(guidance_scale, "guidance_scale")
    rescale = arguments.real(guidance_rescale, "guidance_rescale", 0, 1)
    size = negative_size = None
    if model.config.unet.vector == "add_embedding":
        size = _size(config, batch, AESTHETIC_SCORE)
        negative_size = _size(config, batch, NEGATIVE_AESTHETIC_SCORE)
    inputs = SampleInputs(
        tokens=_tokenize(model, prompts, "prompt"),
        negative_tokens=None,
        negative_is_zero=None,
        key=arguments.key_words(seed) if key is None else arguments.root_key(key),
        image_indices=arguments.indices(image_indices, batch),
        tableau=tableau,
        clip=_clip(schedule, sampler),
        guidance_scale=_for_each(batch, scale),
        guidance_rescale=_for_each(batch, rescale),
        size=size,
        latents=arguments.latents(latents, shape),
        noise=arguments.noise(noise, shape, _noisy_rows(tableau)),
    )
    if not guided:
        return inputs, config
    negative = arguments.negative_prompts(negative_prompt, batch, num_images_per_prompt)
    zero = negative_prompt is None and model.config.zero_empty_negative
    inputs = inputs._replace(
        negative_tokens=_tokenize(model, negative, "negative prompt"),
        negative_is_zero=_for_each(batch, zero),
        negative_size=negative_size,
    )
    return inputs, config


def generate(
    prompt: Prompts,
    *,
    model: Model | str | os.PathLike | None = None,
    negative_prompt: Prompts | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | Literal["model"] | None = "model",
    guidance_rescale: float = 0.0,
    num_images_per_prompt: int = 1,
    sampler: str | None = None,
    eta: float | None = None,
    seed: int = 0,
    key: jax.Array | None = None,
    image_indices: Sequence[int] | None = None,
    latents: Shaped[Any, "b h w c"] | None = None,
    clip_skip: int = 0,
    dtype: Dtype | None = None,
    output_type: Literal["uint8", "float", "latent", "pil"] = "uint8",
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Any:
    """Draws pictures of prompts.

    The first call for a model, batch and size compiles one program; prompt, negative
    prompt, seed, scales, sampler, steps and η are its inputs. Ctrl-C stops it within
    one step; without a progress bar, on a GPU or TPU, the device finishes alone.

    Args:
        prompt: one, or several that become one batch.
        model: from `sdjax.load`, or a path to load; None: the bundled one.
        negative_prompt: what to steer away from; one for all prompts or one for each.
            None: the empty prompt, or what the model was trained with in its place.
        height: of the image in pixels, a multiple of the autoencoder's factor (8);
            None: the model's own.
        width: likewise.
        num_inference_steps: sampling steps; None: what the model names, else 30.
        guidance_scale: classifier-free guidance; 1 is none. "model": what the model
            names, else 7.5. None leaves it out of the program, which halves the work of
            models that were distilled.
        guidance_rescale: φ of Lin et al. 2023 (arXiv:2305.08891), eq. 16, in [0, 1].
        num_images_per_prompt: image j of prompt i is row i * this + j.
        sampler: a name in `sdjax.diffusion.SAMPLERS`; None: the model's own, else
            dpmpp_2m.
        eta: noise that DDIM, and the ancestral and SDE samplers, add; None: the
            sampler's default.
        seed: image i draws from fold_in(jax.random.key(seed), i), whatever else is in
            the batch.
        key: in place of a seed.
        image_indices: the images' numbers under the seed; 0, 1, 2, … by default.
        latents: start from this unit-variance noise, [N, h, w, C].
        clip_skip: last layers of the text encoder to leave out.
        dtype: the networks compute in it; None: bfloat16 where the parameters are
            that, float16 on a GPU where they are that, else float32.
        output_type: "uint8", "float" in [0, 1], "latent" (times the scaling factor),
            or "pil".
        mesh: devices to spread the batch over its "data" axis; None: the local ones.
        progress: shows a bar on standard error. On a GPU or TPU this keeps the program
            out of the persistent compilation cache.

    Returns:
        Images [N, height, width, 3] as numpy, latents [N, h, w, C], or a list of
        PIL.Image.

    Raises:
        SdjaxError: if an argument is out of range.
    """
    model = _as_model(model)
    arguments.one_of(output_type, "output_type", (*get_args(OutputType), "pil"))
    mesh = parallel.make_mesh() if mesh is None else mesh
    if dtype is None:
        dtype = default_dtype(model, mesh.devices.flat[0].platform)
    inputs, config = prepare(
        prompt,
        model=model,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        num_images_per_prompt=num_images_per_prompt,
        sampler=sampler,
        eta=eta,
        seed=seed,
        key=key,
        image_indices=image_indices,
        latents=latents,
        clip_skip=clip_skip,
        dtype=dtype,
        output_type="uint8" if output_type == "pil" else output_type,
    )
    images = run(model, inputs, config, mesh=mesh, show=progress)
    if output_type == "pil":
        return [PIL.Image.fromarray(image) for image in images]
    return images


def default_dtype(model: Model, platform: str | None = None) -> Dtype:
    """The type that the networks compute in, from the one they are stored in.

    `platform` is the one they run on, "cpu", "gpu" or "tpu"; None: JAX's own choice.
    """
    stored = jax.tree.leaves(model.params["unet"])[0].dtype.name
    if stored == "float16" and (platform or jax.default_backend()) != "gpu":
        return "float32"
    return stored if stored in get_args(Dtype) else "float32"


def _as_model(model: Model | str | os.PathLike | None) -> Model:
    if model is None:
        return bundled()
    if isinstance(model, str | os.PathLike):
        return load(model)
    if not isinstance(model, Model):
        raise SdjaxError(
            f"model is {model!r:.80}, but must be one from sdjax.load, or its path"
        )
    return model


def _config(
    model: Model,
    height: int | None,
    width: int | None,
    dtype: Any,
    clip_skip: int,
    output_type: str,
) -> SampleConfig:
    """What the program is fixed to; refuses what it cannot draw."""
    factor = model.config.vae.downsample_factor
    sizes = {
        name: arguments.side(
            model.config.sample_size if given is None else given, name, factor
        )
        for name, given in (("height", height), ("width", width))
    }
    if dtype is None:
        dtype = default_dtype(model)
    towers = model.config.text_encoders.values()
    spare = [t.num_layers - 1 - (t.states == "penultimate") for t in towers]
    arguments.check_text_to_image(model.config)
    return SampleConfig(
        model=model.config,
        **sizes,
        dtype=arguments.dtype_name(dtype, get_args(Dtype)),
        clip_skip=arguments.whole(clip_skip, "clip_skip", 0, max(0, min(spare))),
        output_type=arguments.one_of(output_type, "output_type", get_args(OutputType)),
    )


def _tableau(
    schedule: ScheduleConfig, sampler: str, steps: int, eta: float | None, pad: bool
) -> diffusion.Tableau:
    if not isinstance(sampler, str):
        raise SdjaxError(f"sampler is {sampler!r:.80}, but must be a name as 'ddim'")
    steps = arguments.whole(
        steps, "num_inference_steps", 1, schedule.num_train_timesteps
    )
    if eta is not None:
        eta = arguments.real(eta, "eta", 0, 1)
    return diffusion.tableau(schedule, sampler, steps, eta=eta, pad=pad)


def _noisy_rows(tableau: diffusion.Tableau) -> int:
    """Rows up to the last that adds noise."""
    return 1 + int(np.max(np.nonzero(tableau.update[..., -1])[0], initial=-1))


def _tokenize(model: Model, prompts: list[str], what: str) -> dict[str, Any]:
    """Ids for each tower; warns of words that do not fit."""
    tokens = {}
    dropped: dict[str, tuple[str, int]] = {}  # by prompt: words, limit
    for name, tokenizer in model.tokenizers.items():
        encoded = tokenizer(prompts)
        tokens[name] = encoded.ids
        for prompt, words in zip(prompts, encoded.dropped, strict=True):
            if words:
                dropped[prompt] = words, encoded.ids.shape[1]
    for words, limit in dropped.values():
        warnings.warn(
            f"the {what} is longer than {limit} tokens; dropped: {words}", stacklevel=4
        )
    return tokens


# What follows is numpy, which takes the place of a JAX array wherever one is traced.


def _for_each(batch: int, value: float) -> Any:
    return np.full(batch, value, np.float32)


def _clip(schedule: ScheduleConfig, sampler: str) -> Any:
    limit = diffusion.clip_range(schedule, sampler)
    return np.float32(np.inf if limit is None else limit)


def _size(config: SampleConfig, batch: int, score: float) -> Any:
    """SDXL's picture of the picture: drawn at its full size, nothing cropped."""
    row = [config.height, config.width, 0, 0]
    row += [score] if config.model.aesthetic_score else [config.height, config.width]
    return np.tile(np.array(row, np.float32), (batch, 1))
