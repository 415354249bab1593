"""What an image was made from, and the PNG that carries it.

A PNG has two text chunks: `sdjax`, JSON with everything needed to make the image
again, and `parameters`, the text that AUTOMATIC1111's web UI writes and reads.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import secrets
import sys
import tempfile
import types
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from sdjax.errors import SdjaxError

StrPath = str | os.PathLike[str]

# As AUTOMATIC1111 calls them; it does not know those of the last line.
_DISPLAY_NAMES = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "dpmpp_2s_a": "DPM++ 2S a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
    **{"ddpm": "DDPM", "deis": "DEIS", "tcd": "TCD"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything needed to make one image again.

    Attributes:
        negative_prompt: None: none was given, which SDXL tells from an empty one.
        image_index: which image of the seed it is, from 0.
        height, width: in pixels.
        eta: None: the sampler's own.
        clip_skip: layers left out at the end, diffusers' counting.
        dtype: the networks computed in it.
        storage_dtype: the weights were converted to it; None: kept as in the file.
        model: path or name, as it was given.
        model_hash: tells whether a model is the one that made the image.
        tokenizer, variant, prediction_type: as given to `sdjax.load`; None: not given.
        sdjax, jax, backend: versions and device kind that made the image.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    image_index: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    sampler: str
    eta: float | None
    clip_skip: int
    dtype: str
    storage_dtype: str | None
    model: str
    model_hash: str | None
    tokenizer: str | None
    variant: str | None
    prediction_type: str | None
    sdjax: str
    jax: str
    backend: str


def to_json(recipe: Recipe) -> str:
    """Writes the recipe as JSON in ASCII."""
    return json.dumps(dataclasses.asdict(recipe))


def from_json(text: str, source: str = "the recipe") -> Recipe:
    """Reads what `to_json` wrote.

    Args:
        text: JSON.
        source: what errors call the place it comes from.

    Raises:
        SdjaxError: if it is not JSON, or a field is missing, unknown or of a type
            that is not its own.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SdjaxError(f"{source} has a recipe that is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise SdjaxError(f"{source} has a recipe that is no JSON object")
    fields = {field.name: field.type for field in dataclasses.fields(Recipe)}
    for name in fields:
        if name not in data:
            raise SdjaxError(f"{source} has a recipe without {name!r}")
    for name, value in data.items():
        if name not in fields:
            raise SdjaxError(
                f"{source} has a recipe with an unknown field {name!r:.80}"
            )
        if not _fits(value, fields[name]):
            raise SdjaxError(f"{source} has a recipe whose {name!r} is {value!r:.80}")
    return Recipe(**data)


def _fits(value: object, annotation: object) -> bool:
    """Whether `value` is of a field's type; whole numbers are floats too."""
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(annotation))
    if isinstance(value, bool):
        return False
    if annotation is float:
        # Not NaN, not infinite, and no integer beyond every float.
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, typing.cast(type, annotation))


def a1111_text(recipe: Recipe) -> str:
    """Writes the recipe as AUTOMATIC1111's infotext, which many programs read.

    Its "Clip skip" counts from 1 where diffusers counts from 0. Noise differs between
    the two programs, so that there the same seed gives another image.
    """
    values = {
        "Steps": recipe.num_inference_steps,
        "Sampler": sampler_display_name(recipe.sampler),
        "CFG scale": f"{recipe.guidance_scale:g}",
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.model_hash and recipe.model_hash[:10],
        "Model": _model_name(recipe.model),
        "Batch pos": recipe.image_index or None,
        "Clip skip": recipe.clip_skip + 1 if recipe.clip_skip else None,
        "Eta": None if recipe.eta is None else f"{recipe.eta:g}",
        "CFG rescale": f"{recipe.guidance_rescale:g}",
        "Version": f"sdjax {recipe.sdjax}",
    }
    if not recipe.guidance_rescale:
        del values["CFG rescale"]
    lines = [recipe.prompt]
    if recipe.negative_prompt:
        lines.append(f"Negative prompt: {recipe.negative_prompt}")
    pairs = (f"{key}: {_quoted(v)}" for key, v in values.items() if v is not None)
    lines.append(", ".join(pairs))
    # A PNG's text holds no NUL and no half of a surrogate pair.
    text = "\n".join(lines).replace("\0", " ").strip()
    return text.encode("utf-8", "replace").decode("utf-8")


def sampler_display_name(sampler: str) -> str:
    """Names a sampler as AUTOMATIC1111 does, "DPM++ 2M Karras" for dpmpp_2m_karras."""
    for suffix in ("_karras", "_exponential"):
        if sampler.endswith(suffix):
            stem = sampler_display_name(sampler.removesuffix(suffix))
            return f"{stem} {suffix[1:].title()}"
    return _DISPLAY_NAMES.get(sampler, sampler)


def _model_name(model: str) -> str:
    name = PurePosixPath(model.replace("\\", "/")).name
    return name.removesuffix(".safetensors").removesuffix(".ckpt")


def _quoted(value: object) -> str:
    """Quotes what would not survive between commas and colons."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def save_png(
    path: StrPath, image: UInt8[np.ndarray, "height width 3"], recipe: Recipe
) -> None:
    """Writes an image with its recipe, whole or not at all; replaces what is there.

    Args:
        path: of the file; its folder must exist.
        image: sRGB.
        recipe: of this image.

    Raises:
        SdjaxError: if it cannot be written; `path` is then as it was.
    """
    target = Path(os.path.realpath(path))  # writes through a link, as open() does
    with _told(path), _written_beside(target, _encode(image, recipe)) as temporary:
        os.replace(temporary, target)


def save_numbered_png(
    folder: StrPath,
    image: UInt8[np.ndarray, "height width 3"],
    recipe: Recipe,
    *,
    prefix: str = "",
) -> Path:
    """Writes an image as the next of a folder: 00000.png, 00001.png, ...

    No file is ever replaced, whoever else writes into the folder meanwhile.

    Args:
        folder: must exist.
        image: sRGB.
        recipe: of this image.
        prefix: stands before the number.

    Returns:
        The path of the new file.

    Raises:
        SdjaxError: if it cannot be written; there is then no new file.
    """
    folder = Path(folder)
    with _told(folder):
        number = _next_number(folder, prefix)
        content = _encode(image, recipe)
        with _written_beside(folder / f"{prefix}{number:05d}.png", content) as file:
            while True:
                path = folder / f"{prefix}{number:05d}.png"
                try:
                    _move_to_new(file, path)
                except FileExistsError:
                    number += 1
                else:
                    return path


def check_writable(folder: StrPath) -> None:
    """Makes sure, before hours of work, that images can be saved in `folder`.

    Raises:
        SdjaxError: if no file can be made there.
    """
    with _told(folder), tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"sdjax")


def read_recipe(path: StrPath) -> Recipe:
    """Reads the recipe of a PNG that sdjax saved; decodes no pixel.

    Raises:
        SdjaxError: if the file is no PNG, or carries no recipe of sdjax.
    """
    try:
        with warnings.catch_warnings():
            # Pixels are not decoded, so their number does no harm.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                text = image.info.get("sdjax")
    except UnidentifiedImageError as error:
        raise SdjaxError(f"{path} is not a PNG image") from error
    except OSError as error:
        raise SdjaxError(f"cannot read {path}: {error.strerror or error}") from error
    # What Pillow raises for a damaged or oversized chunk, or a picture too large.
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SdjaxError(f"{path} is a damaged PNG ({error})") from error
    if not isinstance(text, str):
        raise SdjaxError(f"{path} carries no recipe: sdjax did not save it")
    return from_json(text, str(path))


def _encode(image: UInt8[np.ndarray, "height width 3"], recipe: Recipe) -> bytes:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise SdjaxError(
            f"an image is uint8 [height, width, 3], not {image.dtype} "
            f"{list(image.shape)}"
        )
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", a1111_text(recipe))
    text.add_text("sdjax", to_json(recipe))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue()


@contextlib.contextmanager
def _told(path: StrPath) -> Iterator[None]:
    """Turns what the system refuses into one sentence about `path`."""
    try:
        yield
    except OSError as error:
        raise SdjaxError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _written_beside(target: Path, content: bytes) -> Iterator[Path]:
    """A complete file in the folder of `target`, gone at the end unless moved."""
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _move_to_new(source: Path, target: Path) -> None:
    """Renames `source`; raises FileExistsError rather than replace a file."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: claim the name first
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(source, target)


def _next_number(folder: Path, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d{5,18})\.png")
    matches = map(pattern.fullmatch, os.listdir(folder))
    return max((int(match[1]) for match in matches if match), default=-1) + 1
