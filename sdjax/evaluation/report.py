"""Draws captions whose true pictures are known, and says how near it came."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8
from tqdm import tqdm

from sdjax.config import AutoencoderConfig
from sdjax.data import Source, open_source
from sdjax.data.pictures import decode, fit
from sdjax.errors import SdjaxError
from sdjax.evaluation.retrieval import ranks
from sdjax.evaluation.similarity import psnr, ssim
from sdjax.model import Model
from sdjax.models import Autoencoder, Posterior
from sdjax.pipeline import generate
from sdjax.typing import Params

Pictures = UInt8[np.ndarray, "n h w 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `evaluate` found.

    Attributes:
        captions: those that were drawn.
        truth: their pictures at the model's size.
        drawn: the drawn pictures, [captions, images per caption, h, w, 3].
        ranks: of each drawn picture, how many candidates are nearer to it than its own,
            [captions, images per caption].
        candidates: pictures that it could have been taken for.
        reconstructed: what the autoencoder makes of `truth`.
        psnr: of each of those, in dB.
        ssim: likewise.
    """

    captions: list[str]
    truth: Pictures
    drawn: UInt8[np.ndarray, "n k h w 3"]
    ranks: Int[np.ndarray, "n k"]
    candidates: int
    reconstructed: Pictures
    psnr: np.ndarray
    ssim: np.ndarray

    def top(self, count: int) -> float:
        """The share of drawn pictures whose own is among the `count` nearest."""
        return float(np.mean(self.ranks < count))

    def summary(self) -> dict[str, Any]:
        """The figures, as JSON has them; `per_caption` counts the top-1 hits."""
        hits = (self.ranks < 1).sum(axis=1).tolist()
        return {
            "captions": len(self.captions),
            "images_per_caption": self.ranks.shape[1],
            "candidates": self.candidates,
            "top1": self.top(1),
            "top5": self.top(5),
            "psnr": float(self.psnr.mean()),
            "ssim": float(self.ssim.mean()),
            "per_caption": dict(zip(self.captions, hits, strict=True)),
        }


def evaluate(
    model: Model,
    path: str | os.PathLike[str],
    *,
    among: Sequence[str | os.PathLike[str]] = (),
    limit: int | None = None,
    images_per_caption: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
    **sampling: Any,
) -> Report:
    """Draws the captions of a dataset and finds each picture among all of them.

    Args:
        model: from `sdjax.load`.
        path: captions with their true pictures, as `sdjax.data.open_source` reads.
        among: further pictures that a drawn one may be taken for.
        limit: so many captions, drawn at random with `seed`; None: all.
        images_per_caption: pictures drawn of each.
        batch_size: pictures drawn at once.
        seed: of the drawing, too.
        progress: shows a bar on standard error.
        **sampling: for `sdjax.generate`: num_inference_steps, guidance_scale, sampler.

    Raises:
        SdjaxError: if a picture cannot be read, or there is none.
    """
    source, side = open_source(path), model.config.sample_size
    if not len(source):
        raise SdjaxError(f"{os.fspath(path)} holds no pictures")
    own = _read(source, side)
    count = len(source) if limit is None else min(limit, len(source))
    chosen = np.random.default_rng(seed).permutation(len(source))[:count]
    chosen.sort()
    others = [_read(open_source(other), side).pictures for other in among]
    candidates = np.concatenate([own.pictures, *others])
    captions = [own.captions[i] for i in chosen]
    drawn = _draw(
        model, captions, images_per_caption, batch_size, seed, progress, sampling
    )
    truth = own.pictures[chosen]
    flat = ranks(
        drawn.reshape(-1, *drawn.shape[2:]),
        candidates,
        np.repeat(chosen, images_per_caption),
    )
    reconstructed = reconstruct(model, truth, batch_size)
    return Report(
        captions=captions,
        truth=truth,
        drawn=drawn,
        ranks=flat.reshape(count, images_per_caption),
        candidates=len(candidates),
        reconstructed=reconstructed,
        psnr=psnr(truth, reconstructed),
        ssim=ssim(truth, reconstructed),
    )


def reconstruct(model: Model, pictures: Pictures, batch_size: int = 64) -> Pictures:
    """Encodes to the posterior's mean and decodes."""
    made = []
    for rows in _batches(pictures, batch_size):
        # Every batch has the same size, so that one program serves.
        whole = np.concatenate([rows, np.repeat(rows[-1:], batch_size - len(rows), 0)])
        out = _reconstruct(model.params["vae"], whole, config=model.config.vae)
        made.append(np.asarray(out)[: len(rows)])
    return np.concatenate(made)


class _Read(NamedTuple):
    captions: list[str]
    pictures: Pictures


def _read(source: Source, side: int) -> _Read:
    """Every picture of a source, brought to side × side."""
    captions, pictures = [], []
    for i in range(len(source)):
        sample = source[i]
        image = decode(sample.image, sample.key, shortest=side).image
        pictures.append(np.asarray(fit(image, (side, side)).image))
        captions.append(sample.caption)
    return _Read(captions, np.stack(pictures))


def _draw(
    model: Model,
    captions: list[str],
    per_caption: int,
    batch_size: int,
    seed: int,
    progress: bool,
    sampling: dict[str, Any],
) -> UInt8[np.ndarray, "n k h w 3"]:
    prompts = [caption for caption in captions for _ in range(per_caption)]
    drawn = []
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, desc="drawing", disable=not progress):
        rows = np.arange(start, start + batch_size)
        images = generate(
            [prompts[min(row, len(prompts) - 1)] for row in rows],
            model=model,
            seed=seed,
            image_indices=rows.tolist(),
            progress=False,
            **sampling,
        )
        drawn.append(images[: len(prompts) - start])
    flat = np.concatenate(drawn)
    return flat.reshape(len(captions), per_caption, *flat.shape[1:])


def _batches(pictures: Pictures, size: int) -> list[Pictures]:
    return [pictures[i : i + size] for i in range(0, len(pictures), size)]


@jax.jit(static_argnames="config")
def _reconstruct(params: Params, images: Any, *, config: AutoencoderConfig) -> Array:
    vae = Autoencoder(config)
    x = images.astype(jnp.float32) / 127.5 - 1
    posterior = vae.apply({"params": params}, x, method="encode")
    mean = cast(Posterior, posterior).mode()
    made = cast(Array, vae.apply({"params": params}, mean, method="decode"))
    return jnp.round(jnp.clip(made + 1, 0, 2) * 127.5).astype(jnp.uint8)
