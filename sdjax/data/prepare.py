"""From a stored sample to a row of a batch; all that is random about it is here."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from sdjax.data.buckets import bucket_sizes, nearest_size
from sdjax.data.pictures import decode, fit, shift
from sdjax.data.sample import BadSampleError, Sample, Source
from sdjax.errors import SdjaxError

_STREAM = 1
"""Keeps these draws apart from the order's, which come of the same seed."""


class Row(NamedTuple):
    """One row of a batch; `group` tells which rows can share one (their shapes)."""

    key: str
    caption: str
    arrays: dict[str, np.ndarray]
    group: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What becomes of a sample; see `sdjax.data.open_reader` for the fields."""

    resolution: int
    seed: int
    bucket_step: int | None = None
    crop: Literal["center", "random"] = "center"
    shift: int = 0
    flip: float = 0.0
    caption_dropout: float = 0.0
    caption_templates: tuple[str, ...] = ("{}",)
    sizes: bool = False

    def __call__(
        self,
        sample: Sample,
        empty: Mapping[str, np.ndarray],
        *,
        epoch: int,
        index: int,
    ) -> Row:
        """Prepares sample `index` as it is seen in `epoch`.

        The draws depend on (seed, epoch, index) alone, and each option has draws of
        its own: turning one on changes nothing about the others.

        Raises:
            SdjaxError: if the picture cannot be read.
        """
        draws = np.random.default_rng([_STREAM, self.seed, epoch, index]).random(7)
        dropped = bool(draws[0] < self.caption_dropout)
        template = self.caption_templates[int(draws[1] * len(self.caption_templates))]
        caption = "" if dropped else template.replace("{}", sample.caption)
        arrays: dict[str, Any] = dict(sample.arrays)
        if dropped:
            arrays.update((name, empty[name]) for name in arrays if name in empty)
        if "moments" not in arrays:
            arrays |= self._picture(sample, draws[2:])
        if not self.sizes:
            arrays.pop("size", None)
        if sample.label is not None:
            arrays["label"] = np.int32(sample.label)
        shapes = (f"{name}{np.shape(arrays[name])}" for name in sorted(arrays))
        return Row(sample.key, caption, arrays, " ".join(shapes))

    def _picture(self, sample: Sample, draws: np.ndarray) -> dict[str, np.ndarray]:
        size = (self.resolution, self.resolution)
        if not sample.image:
            raise BadSampleError(f"{sample.key} is empty")
        picture = decode(sample.image, sample.key, shortest=self._shortest)
        if self.bucket_step is not None:
            sizes = bucket_sizes(self.resolution, self.bucket_step)
            size = nearest_size(sizes, picture.size)
        place = (0.5, 0.5) if self.crop == "center" else (draws[0], draws[1])
        fitted = fit(picture.image, size, place)
        pixels = np.asarray(fitted.image)
        if draws[2] < self.flip:
            pixels = pixels[:, ::-1]
        if self.shift:
            right, down = np.floor((2 * self.shift + 1) * draws[3:5]) - self.shift
            pixels = shift(pixels, int(right), int(down))
        arrays = {"image": np.ascontiguousarray(pixels)}
        if self.sizes:
            stored, target = picture.size[::-1], size[::-1]
            arrays["size"] = np.array([*stored, *fitted.corner, *target], np.float32)
        return arrays

    @property
    def _shortest(self) -> int:
        """Sides of buckets reach from half to twice the resolution."""
        return self.resolution * (1 if self.bucket_step is None else 2)


def check_preparation(prepare: Preparation, source: Source) -> None:
    """Refuses what is out of range, or cannot be done to what `source` holds.

    Raises:
        SdjaxError: naming the field, as `DataConfig` has it, and its value.
    """
    for name in ("flip", "caption_dropout"):
        if not 0 <= getattr(prepare, name) <= 1:
            raise SdjaxError(
                f"{name} is {getattr(prepare, name)}, but must be from 0 to 1"
            )
    if prepare.resolution < 1 or not 0 <= prepare.shift < prepare.resolution:
        raise SdjaxError(
            f"resolution is {prepare.resolution} and shift {prepare.shift}: resolution "
            "must be 1 or more, shift from 0 to below it"
        )
    if prepare.crop not in ("center", "random"):
        raise SdjaxError(f"crop is {prepare.crop!r:.40}: it can be center or random")
    templates = prepare.caption_templates
    if not templates or not all("{}" in template for template in templates):
        raise SdjaxError(
            f"caption_templates are {templates!r:.80}: each must have a {{}}"
        )
    if prepare.bucket_step is not None:
        bucket_sizes(prepare.resolution, prepare.bucket_step)
    # In a cache, these were settled when it was written.
    for name, wanted in source.settings.items():
        given = getattr(prepare, name)
        if given != wanted:
            raise SdjaxError(
                f"{name} is {given!r:.80}, but the cache {source.path} "
                f"was written with {wanted!r:.80}"
            )
