"""Where training begins: a model's config, parameters and tokenizers.

Each component is drawn from the run's seed, or read from a model on disk.
"""

import dataclasses
import hashlib
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from sdjax import weights
from sdjax.config import ModelConfig
from sdjax.errors import SdjaxError
from sdjax.model import Model, load, locate
from sdjax.models import init_params
from sdjax.text import read_tokenizer_files
from sdjax.training.checkpoint import named_leaves
from sdjax.training.config import TrainConfig
from sdjax.typing import Params


class Origin(NamedTuple):
    """What a run begins with.

    Attributes:
        config: of the run, with the model that the components make.
        params: by component, float32; an autoencoder's run may have that alone.
        tokenizer_files: as in `sdjax.Model`.
    """

    config: TrainConfig
    params: Params
    tokenizer_files: dict[str, dict[str, bytes]]

    def model(self, params: Params, path: str) -> Model:
        """The model with `params`, whose tokenizers are those that it began with."""
        return Model(self.config.model, params, self.tokenizer_files, path)


def find_origin(config: TrainConfig) -> Origin:
    """Reads and draws the parameters that a run begins with.

    Raises:
        SdjaxError: if a model cannot be read, or one that does not learn is missing.
    """
    if config.init_from is not None:
        model = load(config.init_from, dtype="float32", tokenizer=config.tokenizer)
        config = _with(config, model.config)
        origin = Origin(config, model.params, model.tokenizer_files)
    else:
        _demand_sources(config)
        origin = Origin(config, {}, {})
    origin = _with_autoencoder(_with_text_encoder(origin))
    origin = _drawn(_with_resolution(origin))
    if config.tokenizer is not None and config.init_from is None:
        files = read_tokenizer_files(config.tokenizer)
        names = [
            name.replace("text_encoder", "tokenizer")
            for name in origin.config.model.text_encoders
        ]
        origin = origin._replace(tokenizer_files=dict.fromkeys(names, files))
    return origin


def digest(params: Any) -> str:
    """SHA-256 of the names, shapes and bytes of all leaves."""
    hasher = hashlib.sha256()
    for name, leaf in named_leaves(params).items():
        array = np.ascontiguousarray(leaf)
        hasher.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        hasher.update(array.reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def _with(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    return dataclasses.replace(config, model=model)


def _demand_sources(config: TrainConfig) -> None:
    """Refuses to train on components that were drawn and never learn."""
    if config.task == "autoencoder":
        return
    if config.autoencoder_from is None:
        raise SdjaxError(
            "autoencoder_from is missing: a diffusion model learns latents, which an "
            "autoencoder has to make (the first phase: task=autoencoder)"
        )
    learns = config.diffusion.train_text_encoder or config.text_encoder_from
    if config.model.text_encoders and not learns:
        raise SdjaxError(
            "text_encoder_from is missing: name a model with a text encoder, or train "
            "one with diffusion.train_text_encoder=true"
        )


def _with_resolution(origin: Origin) -> Origin:
    """Takes the pictures' side from the model, where the config leaves it open."""
    config = origin.config
    if config.data.resolution is not None:
        return origin
    data = dataclasses.replace(config.data, resolution=config.model.sample_size)
    return origin._replace(config=dataclasses.replace(config, data=data))


def _with_autoencoder(origin: Origin) -> Origin:
    path = origin.config.autoencoder_from
    if path is None:
        return origin
    vae, params = weights.read_autoencoder(locate(path))
    model = dataclasses.replace(origin.config.model, vae=vae)
    return origin._replace(
        config=_with(origin.config, model), params={**origin.params, "vae": params}
    )


def _with_text_encoder(origin: Origin) -> Origin:
    path = origin.config.text_encoder_from
    if path is None or origin.config.task == "autoencoder":
        return origin
    source = load(path, dtype="float32", tokenizer=origin.config.tokenizer)
    towers = source.config.text_encoders
    if not towers:
        raise SdjaxError(f"text_encoder_from: {os.fspath(path)} has no text encoder")
    model = dataclasses.replace(
        origin.config.model,
        text_encoder=source.config.text_encoder,
        text_encoder_2=source.config.text_encoder_2,
    )
    return Origin(
        _with(origin.config, model),
        {**origin.params, **{name: source.params[name] for name in towers}},
        source.tokenizer_files,
    )


def _drawn(origin: Origin) -> Origin:
    """Draws what has not been read; of an autoencoder's run, the autoencoder alone."""
    model = origin.config.model
    wanted = {"vae"}
    if origin.config.task == "diffusion":
        wanted |= {"unet", *model.text_encoders}
        if model.class_embedder is not None:
            wanted.add("class_embedder")
    missing = wanted - origin.params.keys()
    if not missing:
        return origin
    key = jax.random.key(origin.config.seed)
    drawn = init_params(model, key, missing)
    return origin._replace(params={**origin.params, **drawn})
