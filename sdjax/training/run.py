"""`train`: a run from its config to its model, in one folder."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

from sdjax import data, weights
from sdjax.cache import enable_compilation_cache
from sdjax.config import ModelConfig
from sdjax.data.reader import Tokenize
from sdjax.errors import SdjaxError
from sdjax.model import Model
from sdjax.training.check import check_config, check_pictures
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.config import TrainConfig
from sdjax.training.interruption import heard
from sdjax.training.loop import Loop
from sdjax.training.origin import Origin, find_origin
from sdjax.training.resume import begin
from sdjax.training.scaling_factor import measure_scaling_factor, with_scaling_factor
from sdjax.training.workdir import (
    Workdir,
    opened,
    record_config,
    record_versions,
    write_whole,
)
from sdjax.weights.folder_write import folder_config, folder_files

FINISHED = "finished.json"
SCALING_BATCHES = 32
"""Batches that the latents' deviation is measured on."""


class Outcome(NamedTuple):
    """How a call of `train` ended.

    Attributes:
        step: the last, whose state is saved.
        stopped_by: the signal that asked to stop; None: the run is finished.
        model: where the trained model lies; None: not finished.
        waiting_share: of the time of the steps that the device waited for data.
        skipped: steps whose loss was not finite and whose update was left out.
        unread: shard -> keys of the pictures that could not be read.
    """

    step: int
    stopped_by: signal.Signals | None
    model: Path | None
    waiting_share: float
    skipped: int
    unread: dict[str, list[str]]


def train(
    config: TrainConfig, workdir: str | os.PathLike, *, show: bool = True
) -> Outcome:
    """Trains, or goes on where a run in the same folder was stopped or killed.

    SIGTERM and Ctrl-C end it after the step under way, with its state saved.

    Args:
        config: the whole recipe.
        workdir: a folder of the run's own, see `sdjax.training.workdir`.
        show: progress, on standard error.

    Raises:
        SdjaxError: if the config, the data or the folder cannot be used; if the loss is
            not finite and `on_nan` is "stop"; or if the disk is full. The state of the
            last step is saved, where it can be.
    """
    check_config(config)
    enable_compilation_cache()
    try:
        return _train(config, workdir, show)
    except OSError as error:
        file = error.filename or workdir
        raise SdjaxError(f"cannot write {file}: {error.strerror or error}") from error


def _train(config: TrainConfig, workdir: str | os.PathLike, show: bool) -> Outcome:
    with heard() as interruption, opened(workdir) as place:
        origin = find_origin(config)
        config = origin.config
        check_pictures(config)
        record_config(place, config)
        checkpoints = Checkpoints(
            place.checkpoints,
            keep=config.checkpoints.keep,
            keep_every_steps=config.checkpoints.keep_every_steps,
        )
        with open_data(origin) as reader, checkpoints:
            loop = begin(origin, place, checkpoints, reader)
            record_versions(place, loop.step)
            loop.run(interruption, show=show)
            model = None
            if loop.step >= config.steps:
                model = _finish(loop, place)
            return Outcome(
                loop.step,
                None if model else interruption.signal,
                model,
                loop.meter.waiting_share,
                loop.skipped,
                reader.skipped,
            )


def open_data(origin: Origin) -> data.Reader:
    """The batches of a run, from its pictures or its cache."""
    config = origin.config
    settings = config.data
    assert settings.resolution is not None  # find_origin has filled it in
    return data.open_reader(
        data.open_source(settings.cache or settings.path),
        batch_size=settings.batch_size,
        resolution=settings.resolution,
        seed=config.seed,
        tokenize=_tokenize(origin),
        bucket_step=settings.bucket_step,
        crop=settings.crop,
        shift=settings.shift,
        flip=settings.flip,
        caption_dropout=settings.caption_dropout,
        caption_templates=settings.caption_templates,
        num_workers=settings.num_workers,
        max_bad_share=settings.max_bad_share,
        sizes=config.model.unet.vector == "add_embedding",
    )


def _tokenize(origin: Origin) -> Tokenize | None:
    """Captions to the ids of each text tower, where the task reads captions."""
    config = origin.config
    if config.task == "autoencoder" or not config.model.text_encoders:
        return None
    source = config.init_from or config.text_encoder_from or "the run"
    tokenizers = origin.model({}, source).tokenizers
    return lambda captions: {n: one(captions).ids for n, one in tokenizers.items()}


def _finish(loop: Loop, workdir: Workdir) -> Path:
    """Writes the trained model, unless it is there since the last step."""
    marker = workdir.path / FINISHED
    done = {"step": loop.step}
    if workdir.model.exists() and _read(marker) == done:
        return workdir.model
    fresh, old = workdir.path / ".model.new", workdir.path / ".model.old"
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    _write_model(loop, fresh)
    if workdir.model.exists():  # of fewer steps
        os.rename(workdir.model, old)
    os.rename(fresh, workdir.model)
    write_whole(marker, json.dumps(done).encode())
    shutil.rmtree(old, ignore_errors=True)
    return workdir.model


def _write_model(loop: Loop, path: Path) -> None:
    config, params = loop.config, loop.learned()
    if config.task == "autoencoder" and config.init_from is None:
        vae = config.model.vae
        if vae.codebook_size is None:  # latents of the others are used as they are
            batches = itertools.islice(loop.reader, SCALING_BATCHES)
            arrays = (batch.arrays for batch in batches)
            factor = measure_scaling_factor(params, arrays, config)
            vae = with_scaling_factor(config, factor).model.vae
        side = config.data.resolution or config.model.sample_size
        weights.write_autoencoder(path, vae, params["vae"], sample_size=side)
        return
    model: Model = loop.origin.model(params, str(path))
    weights.write(
        str(path),
        model.config,
        model.params,
        model.tokenizer_files,
        format="diffusers" if _fits_diffusers(model.config) else "orbax",
    )


def _fits_diffusers(config: ModelConfig) -> bool:
    """Whether a diffusers folder can say what the model is."""
    try:
        folder_files(folder_config(config), {})
    except SdjaxError:
        return False
    return True


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
