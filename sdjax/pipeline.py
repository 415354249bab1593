"""From prompts to pictures: `prepare` makes a program's inputs, `generate` runs it."""

import functools
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
import PIL.Image
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Shaped
from tqdm import tqdm

from sdjax import diffusion, parallel
from sdjax.compilation import enable_cache
from sdjax.config import ModelConfig, ScheduleConfig
from sdjax.errors import SdjaxError
from sdjax.model import Model, load
from sdjax.program import Dtype, SampleConfig, SampleInputs, sample
from sdjax.progress import Listener, listening, report

DEFAULT_SAMPLER = "dpmpp_2m"
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
POLL_SECONDS = 0.02

Prompts = str | Sequence[str]


def prepare(
    prompt: Prompts,
    *,
    model: Model,
    negative_prompt: Prompts | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 30,
    guidance_scale: float | None = 7.5,
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
    prompts = _repeat(_as_list(prompt, "prompt"), num_images_per_prompt)
    batch = len(prompts)
    config = SampleConfig(
        model=model.config,
        height=height if height is not None else model.config.sample_size,
        width=width if width is not None else model.config.sample_size,
        dtype=dtype or default_dtype(model),
        clip_skip=clip_skip,
        output_type=output_type,
    )
    _check(config)
    schedule = model.config.schedule
    sampler = sampler or schedule.sampler or DEFAULT_SAMPLER
    distilled = model.config.unet.guidance_dim is not None
    guided = guidance_scale is not None and not distilled
    scale = 1.0 if guidance_scale is None else guidance_scale
    size = negative_size = None
    if model.config.unet.vector == "add_embedding":
        size = _size(config, batch, AESTHETIC_SCORE)
        negative_size = _size(config, batch, NEGATIVE_AESTHETIC_SCORE)
    inputs = SampleInputs(
        tokens=_tokenize(model, prompts),
        negative_tokens=None,
        negative_is_zero=None,
        key=_key_words(seed) if key is None else key,
        image_indices=_indices(image_indices, batch),
        tableau=diffusion.tableau(
            schedule,
            sampler,
            num_inference_steps,
            eta=eta,
            pad=pad,
        ),
        clip=_clip(schedule, sampler),
        guidance_scale=_for_each(batch, scale),
        guidance_rescale=_for_each(batch, guidance_rescale),
        size=size,
        latents=_given(latents, (batch, *config.latent_shape), "latents"),
        noise=_given(noise, (None, batch, *config.latent_shape), "noise"),
    )
    if not guided:
        return inputs, config
    negative = _as_list("" if negative_prompt is None else negative_prompt, "negative")
    if len(negative) == 1:
        negative *= batch // num_images_per_prompt
    negative = _repeat(negative, num_images_per_prompt)
    if len(negative) != batch:
        raise SdjaxError(
            f"{len(negative) // num_images_per_prompt} negative prompts do not fit "
            f"{batch // num_images_per_prompt} prompts: give one, or one for each"
        )
    zero = negative_prompt is None and model.config.zero_empty_negative
    inputs = inputs._replace(
        negative_tokens=_tokenize(model, negative),
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
    num_inference_steps: int = 30,
    guidance_scale: float | None = 7.5,
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
    progress: bool = False,
) -> Any:
    """Draws pictures of prompts.

    The first call for a model, batch and size compiles one program; prompt, negative
    prompt, seed, scales, sampler, steps and η are its inputs. Ctrl-C stops it within
    one step.

    Args:
        prompt: one, or several that become one batch.
        model: from `sdjax.load`, or a path to load.
        negative_prompt: what to steer away from; one for all prompts or one for each.
            None: the empty prompt, or what the model was trained with in its place.
        height: of the image in pixels, a multiple of the autoencoder's factor (8);
            None: the model's own.
        width: likewise.
        num_inference_steps: sampling steps.
        guidance_scale: classifier-free guidance; 1 is none. None leaves it out of the
            program, which halves the work of models that were distilled.
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
        progress: shows a bar on standard error.

    Returns:
        Images [N, height, width, 3] as numpy, latents [N, h, w, C], or a list of
        PIL.Image.

    Raises:
        SdjaxError: if an argument is out of range.
    """
    model = _as_model(model)
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


def run(
    model: Model,
    inputs: SampleInputs,
    config: SampleConfig,
    *,
    mesh: Mesh | None = None,
    show: bool = False,
) -> np.ndarray:
    """Compiles `sample` where it must, runs it over the mesh and waits for it."""
    enable_cache()
    batch = len(inputs.image_indices)
    if mesh is None:
        mesh = parallel.make_mesh(jax.local_devices()[:batch])
    inputs = _pad_batch(inputs, parallel.padded(batch, mesh) - batch)
    params = model.params if mesh.size == 1 else model.replicated(mesh)
    platform = mesh.devices.flat[0].platform
    total = int(np.max(inputs.tableau.step)) + 1
    with tqdm(total=total, disable=not show) as bar:

        def on_step(step: int) -> None:
            bar.update(step - bar.n)

        with listening(on_step) as listener:
            images = run_program(
                params,
                inputs,
                np.int32(listener.number),
                config=config,
                mesh=mesh,
                platform=platform if show or platform == "cpu" else None,
            )
            _wait(images, listener)
    return np.asarray(images)[:batch]


@functools.partial(jax.jit, static_argnames=("config", "mesh", "platform"))
def run_program(params, inputs, number, *, config, mesh, platform):
    """The one program. `platform` None: without reports, so that it can be cached."""

    def program(params, inputs):
        on_step = None
        if platform is not None:
            on_step = functools.partial(report, number, platform=platform)
        return sample(params, inputs, config=config, on_step=on_step)

    return parallel.data_parallel(program, mesh, _specs(inputs))(params, inputs)


def _wait(images: jax.Array, listener: Listener) -> None:
    """Waits for a result such that Ctrl-C is heard, and stops the loop on it."""
    try:
        while not images.is_ready():  # pyright: ignore[reportAttributeAccessIssue]
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        listener.stop = True
        images.block_until_ready()
        raise
    if listener.error is not None:
        raise listener.error


def _specs(inputs: SampleInputs) -> Any:
    """How each input is split over the mesh: by image, where it has one per image."""
    whole = {"key": P(), "tableau": P(), "clip": P(), "noise": P(None, "data")}
    return SampleInputs(
        **{
            name: jax.tree.map(lambda _, name=name: whole.get(name, P("data")), value)
            for name, value in inputs._asdict().items()
        }
    )


def _pad_batch(inputs: SampleInputs, extra: int) -> SampleInputs:
    """Repeats the last image `extra` times."""
    if extra == 0:
        return inputs

    def pad(array, spec):
        if "data" not in spec:
            return array
        axis = list(spec).index("data")
        last = np.take(array, [-1] * extra, axis=axis)
        return np.concatenate([array, last], axis=axis)

    return jax.tree.map(pad, inputs, _specs(inputs))


def default_dtype(model: Model) -> Dtype:
    """The type that the networks compute in, from the one they are stored in."""
    stored = jax.tree.leaves(model.params["unet"])[0].dtype.name
    if stored == "float16" and jax.default_backend() != "gpu":
        return "float32"
    return stored if stored in get_args(Dtype) else "float32"


def _as_model(model: Model | str | os.PathLike | None) -> Model:
    if model is None:
        raise SdjaxError("model is missing: pass one from sdjax.load, or its path")
    return model if isinstance(model, Model) else load(model)


def _as_list(prompt: Prompts, name: str) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise SdjaxError(f"{name} is an empty list: give at least one string")
    return prompts


def _repeat(prompts: list[str], times: int) -> list[str]:
    return [prompt for prompt in prompts for _ in range(times)]


def _check(config: SampleConfig) -> None:
    """Refuses what this program cannot draw."""
    factor = config.model.vae.downsample_factor
    for name, side in (("height", config.height), ("width", config.width)):
        if side <= 0 or side % factor:
            nearest = max(factor, round(side / factor) * factor)
            raise SdjaxError(
                f"{name} {side} is not divisible by {factor}: try {nearest}"
            )
    if config.clip_skip < 0:
        raise SdjaxError(f"clip_skip is {config.clip_skip}, but must be at least 0")
    _check_text_to_image(config.model)


def _check_text_to_image(model: ModelConfig) -> None:
    extra = model.unet.in_channels - model.vae.latent_channels
    if extra:
        raise SdjaxError(
            f"this model's U-Net takes {extra} more channels than a latent has "
            "(inpainting, depth or upscaling): text alone cannot drive it"
        )
    if model.unet.vector not in (None, "add_embedding"):
        raise SdjaxError(
            f"this model's U-Net takes a {model.unet.vector} (an image or a noise "
            "level): text alone cannot drive it"
        )


def _tokenize(model: Model, prompts: list[str]) -> dict[str, Any]:
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
            f"the prompt is longer than {limit} tokens; dropped: {words}", stacklevel=4
        )
    return tokens


# What follows is numpy, which takes the place of a JAX array wherever one is traced.


def _for_each(batch: int, value: float) -> Any:
    return np.full(batch, value, np.float32)


def _clip(schedule: ScheduleConfig, sampler: str) -> Any:
    limit = diffusion.clip_range(schedule, sampler)
    return np.float32(np.inf if limit is None else limit)


def _key_words(seed: int) -> Any:
    """The two words of `jax.random.key(seed)`, for all of its 64 bits."""
    if not 0 <= seed < 2**64:
        raise SdjaxError(f"seed is {seed}, but must be in [0, 2**64)")
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def _indices(image_indices: Sequence[int] | None, batch: int) -> Any:
    if image_indices is None:
        return np.arange(batch, dtype=np.int32)
    if len(image_indices) != batch:
        raise SdjaxError(
            f"image_indices has {len(image_indices)} numbers for {batch} images"
        )
    return np.array(image_indices, np.int32)


def _size(config: SampleConfig, batch: int, score: float) -> Any:
    """SDXL's picture of the picture: drawn at its full size, nothing cropped."""
    row = [config.height, config.width, 0, 0]
    row += [score] if config.model.aesthetic_score else [config.height, config.width]
    return np.tile(np.array(row, np.float32), (batch, 1))


def _given(array: Any, shape: tuple[int | None, ...], name: str) -> Any:
    """Checks an array that the caller hands in."""
    if array is None:
        return None
    if len(array.shape) != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, array.shape, strict=True)
    ):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise SdjaxError(f"{name} has shape {array.shape}, but must be ({wanted})")
    return array
