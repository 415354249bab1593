"""`sdjax generate`: prompts in, PNGs with their recipes out."""

import argparse
import dataclasses
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import jax

import sdjax
from sdjax.config import ScheduleConfig
from sdjax.diffusion import tableau
from sdjax.errors import SdjaxError
from sdjax.model import BUNDLED
from sdjax.pipeline import DEFAULT_SAMPLER, default_dtype
from sdjax.recipe import (
    Recipe,
    check_writable,
    read_recipe,
    save_numbered_png,
    save_png,
)

DEFAULTS = {
    "model": BUNDLED,
    "seed": 0,
    "guidance_rescale": 0.0,
    "clip_skip": 0,
}
_NOT_IMAGES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_LOADING = ("tokenizer", "variant", "prediction_type")
_SAMPLING = (
    "negative_prompt",
    "seed",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "guidance_rescale",
    "sampler",
    "eta",
    "clip_skip",
    "dtype",
)


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where images go: into `file`, or into `folder` with numbered names."""

    folder: Path
    file: Path | None = None
    prefix: str = ""

    def save(self, image: Any, recipe: Recipe) -> Path:
        """Writes one image and returns its path."""
        if self.file is None:
            return save_numbered_png(self.folder, image, recipe, prefix=self.prefix)
        save_png(self.file, image, recipe)
        return self.file


def run(args: argparse.Namespace) -> None:
    """Makes the images, saves them, and prints their paths."""
    origin = None if args.source is None else read_recipe(args.source)
    prompts = args.prompt or ([origin.prompt] if origin else [])
    if not prompts:
        raise SdjaxError('no prompt given: sdjax generate "a slice of pizza"')
    settings = _settings(args, origin)
    count = len(prompts) * (args.num_images_per_prompt or 1)
    destination = _destination(args.output, settings["seed"], count)
    model = _load(settings, args, origin)
    _take_from_model(settings, model)
    settings["dtype"] = settings["dtype"] or default_dtype(model)
    # Reads the model's hash: what can fail does so before the long computation.
    base = _recipe(settings, model)
    if origin is not None:
        _compare(origin, base, str(args.source))
    first = origin.image_index if origin else 0
    saved = 0
    try:
        images = sdjax.generate(
            prompts,
            model=model,
            num_images_per_prompt=count // len(prompts),
            image_indices=range(first, first + count),
            progress=not args.no_progress and sys.stderr.isatty(),
            **{name: settings[name] for name in _SAMPLING},
        )
        for row, image in enumerate(images):
            recipe = dataclasses.replace(
                base,
                prompt=prompts[row * len(prompts) // count],
                image_index=first + row,
                height=image.shape[0],
                width=image.shape[1],
            )
            print(destination.save(image, recipe), flush=True)
            saved += 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{saved} of {count} images saved") from None


def _settings(args: argparse.Namespace, origin: Recipe | None) -> dict[str, Any]:
    """Takes each setting from the command line, else the origin, else the default."""
    given = vars(args) | {"storage_dtype": args.dtype}
    settings = {}
    for name in (*_SAMPLING, *_LOADING, "model", "storage_dtype"):
        fallback = getattr(origin, name) if origin else DEFAULTS.get(name)
        settings[name] = fallback if given[name] is None else given[name]
    if args.sampler is not None and args.eta is None:
        settings["eta"] = None  # that of the origin was for its own sampler
    if settings["sampler"] is not None:  # says that it is unknown, before the model
        tableau(ScheduleConfig(), settings["sampler"], 1, eta=settings["eta"])
    return settings


def _take_from_model(settings: dict[str, Any], model: sdjax.Model) -> None:
    """Fills in what suits the model, where nothing was asked for."""
    config = model.config
    own = {
        "sampler": config.schedule.sampler or DEFAULT_SAMPLER,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
    }
    for name, value in own.items():
        if settings[name] is None:
            settings[name] = value


def _destination(output: str | None, seed: int, count: int) -> Destination:
    """Says where images go, and makes sure that they can be written there."""
    if output is None:
        destination = Destination(Path(), prefix=f"sdjax-{seed}-")
    elif output.lower().endswith(".png") and not os.path.isdir(output):
        if count > 1:
            raise SdjaxError(
                f"--output {output} is one file for {count} images: give a folder"
            )
        destination = Destination(Path(output).parent, file=Path(output))
        _check_file(output)
    else:
        destination = Destination(_folder(output))
    check_writable(destination.folder)
    return destination


def _check_file(output: str) -> None:
    """Makes sure that a file of this name can be written, through a link too."""
    try:
        os.stat(output)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SdjaxError(f"cannot write {output}: {reason}") from error
    if os.path.islink(output):
        check_writable(Path(os.path.realpath(output)).parent)


def _folder(output: str) -> Path:
    folder = Path(output)
    if folder.suffix.lower() in _NOT_IMAGES:
        raise SdjaxError(f"--output {output} must end in .png, or be a folder")
    if "://" in output:
        raise SdjaxError(f"--output {output} is a URL: give a local file or folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SdjaxError(f"cannot make the folder {output}: {reason}") from error
    return folder


def _load(
    settings: dict[str, Any], args: argparse.Namespace, origin: Recipe | None
) -> sdjax.Model:
    """Loads the model; the error says so if it is the one that `origin` names."""
    try:
        return sdjax.load(
            settings["model"],
            dtype=settings["storage_dtype"],
            **{name: settings[name] for name in _LOADING},
        )
    except SdjaxError as error:
        if origin is None or args.model is not None:
            raise
        raise SdjaxError(
            f"{error} (the model of {args.source}; if it has moved, pass --model)"
        ) from error


def _compare(origin: Recipe, here: Recipe, source: str) -> None:
    """Warns of what keeps the image of `origin` from being made again."""
    if origin.model_hash != here.model_hash:
        warnings.warn(
            f"{source} was made by the model {origin.model_hash}, but {here.model} is "
            f"{here.model_hash}: the image may differ",
            stacklevel=2,
        )
    then = (origin.sdjax, origin.jax, origin.backend)
    now = (here.sdjax, here.jax, here.backend)
    if then != now:
        name = "sdjax {} with JAX {} on {}".format
        warnings.warn(
            f"{source} was made by {name(*then)}, and this is {name(*now)}: the image "
            "may differ by rounding",
            stacklevel=2,
        )


def _recipe(settings: dict[str, Any], model: sdjax.Model) -> Recipe:
    """The recipe that all images of a run share; prompt, index and size are blank."""
    blank: dict[str, Any] = {"prompt": "", "image_index": 0, "height": 0, "width": 0}
    return Recipe(
        **(settings | blank),
        model_hash=model.hash,
        sdjax=sdjax.__version__,
        jax=jax.__version__,
        backend=jax.default_backend(),
    )
