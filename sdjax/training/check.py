"""Whether a config's numbers can be trained with, said before anything long begins."""

import dataclasses

from sdjax.errors import SdjaxError
from sdjax.training.config import TrainConfig

_AT_LEAST_ONE = (
    "steps",
    "log_every_steps",
    "data.batch_size",
    "data.resolution",
    "optimizer.accumulation",
    "checkpoints.keep",
    "checkpoints.every_steps",
    "checkpoints.keep_every_steps",
    "samples.every_steps",
    "samples.num_inference_steps",
)
_ABOVE_ZERO = (
    "checkpoints.every_minutes",
    "optimizer.learning_rate",
    "optimizer.clip_norm",
)


def check_config(config: TrainConfig) -> None:
    """Refuses numbers out of range, and sizes that do not divide.

    Raises:
        SdjaxError: naming the field, its value and what would be right.
    """
    for name in _AT_LEAST_ONE:
        value = _field(config, name)
        if value is not None and value < 1:
            raise SdjaxError(f"{name} is {value}, but must be 1 or more")
    for name in _ABOVE_ZERO:
        value = _field(config, name)
        if value is not None and not value > 0:
            raise SdjaxError(f"{name} is {value}, but must be more than 0")
    if not 0 <= config.seed < 2**32:
        raise SdjaxError(f"seed is {config.seed}, but must be from 0 to {2**32 - 1}")
    if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
        raise SdjaxError(
            f"ema_decay is {config.ema_decay}, but must be from 0 to below 1"
        )
    batch, parts = config.data.batch_size, config.optimizer.accumulation
    if batch % parts:
        raise SdjaxError(
            f"data.batch_size is {batch}, which optimizer.accumulation {parts} does "
            "not divide"
        )
    if not config.data.path and config.data.cache is None:
        raise SdjaxError(
            "data.path is empty: name a folder of pictures or shards, as "
            "--set data.path=FOLDER"
        )


def check_pictures(config: TrainConfig) -> None:
    """Refuses pictures that do not become whole latents of the model.

    Raises:
        SdjaxError: naming the side and what it must be a multiple of.
    """
    factor, data = config.model.vae.downsample_factor, config.data
    side, name = (data.resolution, "data.resolution")
    if data.bucket_step is not None:
        side, name = data.bucket_step, "data.bucket_step"
    if data.cache is None and side is not None and side % factor:
        raise SdjaxError(f"{name} is {side}, but must be a multiple of {factor}")


def _field(config: TrainConfig, name: str) -> float | None:
    value = config
    for part in name.split("."):
        assert dataclasses.is_dataclass(value)
        value = getattr(value, part)
    return value  # type: ignore[return-value]
