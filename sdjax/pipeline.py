"""From prompts to pictures: `prepare` makes a program's inputs, `generate` runs it."""

import contextlib
import functools
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
import PIL.Image
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Shaped
from tqdm import tqdm

from sdjax import arguments, diffusion, parallel
from sdjax.cache import enable_compilation_cache
from sdjax.config import ModelConfig, ScheduleConfig
from sdjax.errors import SdjaxError
from sdjax.model import Model, load
from sdjax.program import Dtype, OutputType, SampleConfig, SampleInputs, sample
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
    prompts = _repeated(prompt, "prompt", num_images_per_prompt)
    batch = len(prompts)
    config = _config(model, height, width, dtype, clip_skip, output_type)
    schedule = model.config.schedule
    if sampler is None:
        sampler = schedule.sampler or DEFAULT_SAMPLER
    tableau = _tableau(schedule, sampler, num_inference_steps, eta, pad)
    distilled = model.config.unet.guidance_dim is not None
    guided = guidance_scale is not None and not distilled
    scale = 1.0
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
        latents=_latents(latents, config, batch),
        noise=_noise(noise, config, batch, tableau),
    )
    if not guided:
        return inputs, config
    negative = _negative(negative_prompt, batch, num_images_per_prompt)
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
    enable_compilation_cache()
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

        with _enough_memory(config, batch), listening(on_step) as listener:
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


@contextlib.contextmanager
def _enough_memory(config: SampleConfig, batch: int) -> Iterator[None]:
    """Says what was too large for the device."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise SdjaxError(
            f"{batch} images of {config.height} x {config.width} in {config.dtype} "
            "need more memory than there is: make fewer at once, or smaller ones"
        ) from error


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
    # Raises what failed on the device; reading the array instead may end the process.
    images.block_until_ready()


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
    if isinstance(model, str | os.PathLike):
        return load(model)
    if not isinstance(model, Model):
        raise SdjaxError(
            f"model is {model!r:.80}, but must be one from sdjax.load, or its path"
        )
    return model


def _repeated(prompts: Prompts, name: str, times: int) -> list[str]:
    """Each prompt as often as it has images."""
    listed = arguments.strings(prompts, name)
    most = arguments.MAX_IMAGES // len(listed)
    times = arguments.whole(times, "num_images_per_prompt", 1, most)
    return [prompt for prompt in listed for _ in range(times)]


def _negative(prompts: Prompts | None, batch: int, times: int) -> list[str]:
    """The negative prompt of each image."""
    given = "" if prompts is None else prompts
    negative = _repeated(given, "negative_prompt", times)
    if len(negative) == times:
        negative *= batch // times
    if len(negative) != batch:
        raise SdjaxError(
            f"{len(negative) // times} negative prompts do not fit "
            f"{batch // times} prompts: give one, or one for each"
        )
    return negative


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
    _check_text_to_image(model.config)
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


def _tokenize(model: Model, prompts: list[str], name: str) -> dict[str, Any]:
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
            f"the {name} is longer than {limit} tokens; dropped: {words}", stacklevel=4
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


def _latents(latents: Any, config: SampleConfig, batch: int) -> Any:
    if latents is None:
        return None
    return arguments.array(latents, "latents", (batch, *config.latent_shape))


def _noise(
    noise: Any, config: SampleConfig, batch: int, tableau: diffusion.Tableau
) -> Any:
    if noise is None:
        return None
    noise = arguments.array(noise, "noise", (None, batch, *config.latent_shape))
    rows = len(tableau.step) if tableau.num_rows is None else int(tableau.num_rows)
    if len(noise) < rows:
        raise SdjaxError(f"noise has {len(noise)} rows, but the sampler makes {rows}")
    return noise
