"""What callers hand in, checked before anything long begins.

Each function returns the value in the one form that the program takes, or raises
`SdjaxError` naming the argument, its value and what would be right.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sdjax.config import ModelConfig
from sdjax.errors import SdjaxError

MAX_IMAGES = 2**16
MAX_SIDE = 2**16
_MOST = float(np.finfo(np.float32).max)


def strings(value: Any, name: str) -> list[str]:
    """One string, or several, as a list with at least one."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise _wrong(name, value, "a string or a list of strings")
    values = list(value)
    if not values:
        raise SdjaxError(f"{name} is an empty list: give at least one string")
    for one in values:
        if not isinstance(one, str):
            raise SdjaxError(f"{name} must hold strings, not {one!r:.80}")
    return values


def prompts(value: Any, name: str, times: Any) -> list[str]:
    """Each prompt as often as it has images."""
    listed = strings(value, name)
    times = whole(times, "num_images_per_prompt", 1, MAX_IMAGES // len(listed))
    return [prompt for prompt in listed for _ in range(times)]


def negative_prompts(value: Any, batch: int, times: int) -> list[str]:
    """The negative prompt of each image: one for all, or one for each prompt."""
    listed = strings("" if value is None else value, "negative_prompt")
    wanted = batch // times
    if len(listed) not in (1, wanted):
        raise SdjaxError(
            f"{len(listed)} negative prompts do not fit {wanted} prompts: give one, or "
            "one for each"
        )
    return prompts(listed * (wanted // len(listed)), "negative_prompt", times)


def whole(value: Any, name: str, least: int, most: int) -> int:
    """A whole number from `least` to `most`, of Python or of an array library."""
    wanted = f"a whole number from {least} to {most}"
    if isinstance(value, bool | np.bool_):
        raise _wrong(name, value, wanted)
    try:
        number = operator.index(value)
    except TypeError:
        raise _wrong(name, value, wanted) from None
    if not least <= number <= most:
        raise _wrong(name, value, wanted)
    return number


def real(value: Any, name: str, least: float = -_MOST, most: float = _MOST) -> float:
    """A finite number from `least` to `most`; any that float32 holds by default."""
    wanted = "a finite number"
    if most < _MOST:
        wanted = f"a number from {least:g} to {most:g}"
    if isinstance(value, str | bytes | bool | np.bool_ | complex) or np.ndim(value):
        raise _wrong(name, value, wanted)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _wrong(name, value, wanted) from None
    if not least <= number <= most:  # nor is NaN
        raise _wrong(name, value, wanted)
    return number


def one_of(value: Any, name: str, options: Sequence[str]) -> Any:
    """One of some names."""
    if not isinstance(value, str) or value not in options:
        raise _wrong(name, value, "one of " + ", ".join(options))
    return value


def dtype_name(value: Any, options: Sequence[str]) -> Any:
    """The name of a dtype, given as a name or as NumPy and JAX write it."""
    try:
        name = np.dtype(value).name
    except TypeError:
        name = value
    return one_of(name, "dtype", options)


def key_words(seed: Any) -> Any:
    """The two words of `jax.random.key(seed)`, for all of its 64 bits."""
    number = whole(seed, "seed", 0, 2**64 - 1)
    return np.array([number >> 32, number & 0xFFFFFFFF], np.uint32)


def root_key(key: Any) -> Any:
    """One key of jax.random, typed or as two uint32 words."""
    shape, dtype = getattr(key, "shape", None), getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and shape == ()) and not (dtype == np.uint32 and shape == (2,)):
        given = repr(key) if shape is None else f"{dtype} of shape {shape}"
        raise SdjaxError(f"key is {given:.80}, but must be one key of jax.random.key")
    return key


def indices(values: Any, batch: int) -> Any:
    """The images' numbers under a seed; from 0 where there are none."""
    if values is None:
        return np.arange(batch, dtype=np.int32)
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise _wrong("image_indices", values, "a list of whole numbers")
    numbers = [whole(value, "image_indices", 0, 2**31 - 1) for value in values]
    if len(numbers) != batch:
        raise SdjaxError(f"image_indices has {len(numbers)} numbers for {batch} images")
    return np.array(numbers, np.int32)


def array(value: Any, name: str, shape: tuple[int | None, ...]) -> Any:
    """Finite floats of a shape, in which None stands for any length, as float32."""
    wanted = ", ".join("any" if n is None else str(n) for n in shape)
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise _wrong(name, value, f"an array of shape ({wanted})")
    if len(value.shape) != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, value.shape, strict=True)
    ):
        raise SdjaxError(f"{name} has shape {value.shape}, but must be ({wanted})")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise SdjaxError(f"{name} has dtype {value.dtype}, but must be floats")
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)
    if not isinstance(value, Tracer) and not np.isfinite(value).all():
        raise SdjaxError(f"{name} has values that are NaN or infinite")
    return value


def latents(value: Any, shape: tuple[int, ...]) -> Any:
    """Noise to start from, or None."""
    return None if value is None else array(value, "latents", shape)


def noise(value: Any, shape: tuple[int, ...], rows: int) -> Any:
    """Noise for the rows of a sampler, at least `rows` of them, or None."""
    if value is None:
        return None
    value = array(value, "noise", (None, *shape))
    if len(value) < rows:
        raise SdjaxError(f"noise has {len(value)} rows, but the sampler takes {rows}")
    return value


def side(value: Any, name: str, factor: int) -> int:
    """Height or width in pixels, a multiple of the autoencoder's factor."""
    pixels = whole(value, name, 1, MAX_SIDE)
    if pixels % factor:
        nearest = max(factor, round(pixels / factor) * factor)
        raise SdjaxError(f"{name} {pixels} is not divisible by {factor}: try {nearest}")
    return pixels


def check_text_to_image(model: ModelConfig) -> None:
    """Refuses models that want more than a text."""
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


def _wrong(name: str, value: Any, wanted: str) -> SdjaxError:
    return SdjaxError(f"{name} is {_shown(value)}, but must be {wanted}")


def _shown(value: Any) -> str:
    """The value, short, and on one line whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not write out integers of many digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
