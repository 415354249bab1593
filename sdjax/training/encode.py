"""Writes a cache of what a model's frozen parts make of pictures and captions."""

import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sdjax import data
from sdjax.data.cache import EncodeCaptions
from sdjax.data.shards import Written
from sdjax.model import Model
from sdjax.models import Autoencoder, Posterior
from sdjax.text_conditioning import encode_tokens


def cache_states(
    model: Model,
    source: data.Source,
    path: str | os.PathLike[str],
    *,
    resolution: int,
    bucket_step: int | None = None,
    text: bool = False,
    batch_size: int = 16,
    report: Callable[[int], object] = lambda _: None,
) -> Written:
    """Encodes every picture to its posterior's moments, which a run reads instead.

    A call that was stopped goes on where it was. The networks compute in float32.

    Args:
        model: whose autoencoder, and text towers, are frozen in the run.
        source: of pictures.
        path: of the folder; it becomes `data.cache` of the run.
        resolution: as the run's `data.resolution`.
        bucket_step: as the run's `data.bucket_step`.
        text: whether captions are encoded as well; else they stay captions.
        batch_size: of the encoding.
        report: is told how many samples are done.

    Raises:
        SdjaxError: if something else is at `path`, or no sample can be read.
    """
    return data.write_cache(
        source,
        path,
        encode_images=_image_encoder(model),
        encode_captions=_caption_encoder(model) if text else None,
        resolution=resolution,
        made_with=model.hash,
        bucket_step=bucket_step,
        batch_size=batch_size,
        report=report,
    )


def _image_encoder(
    model: Model,
) -> Callable[[UInt8[np.ndarray, "b height width 3"]], Float[np.ndarray, "b h w c"]]:
    vae = Autoencoder(model.config.vae)

    @jax.jit
    def encode(params: Any, images: Array) -> Array:
        x = images.astype(jnp.float32) / 127.5 - 1
        with jax.default_matmul_precision("highest"):
            out = vae.apply({"params": params}, x, method="encode")
        mean, logvar = cast(Posterior, out)
        return jnp.concatenate([mean, logvar], axis=-1)

    return lambda images: np.asarray(encode(model.params["vae"], images))


def _caption_encoder(model: Model) -> EncodeCaptions:
    @jax.jit
    def encode(params: Any, tokens: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return encode_tokens(params, tokens, model.config, dtype="float32")

    def captions(texts: list[str]) -> Mapping[str, np.ndarray]:
        tokens = {name: one(texts).ids for name, one in model.tokenizers.items()}
        towers = {name: model.params[name] for name in tokens}
        context, pooled = encode(towers, tokens)
        states = {"context": np.asarray(context)}
        if model.config.unet.vector == "add_embedding":
            states["pooled"] = np.asarray(pooled)
        return states

    return captions
