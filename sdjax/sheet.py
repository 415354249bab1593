"""Several pictures on one sheet, for people to look at."""

import math
import os
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import UInt8

_GAP = 2

Pictures = UInt8[np.ndarray, "n h w 3"]
Sheet = UInt8[np.ndarray, "height width 3"]


def tile(images: Pictures, columns: int) -> Sheet:
    """Lays pictures out in rows, on white."""
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    shape = rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3
    sheet = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + _GAP), i % columns * (width + _GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_sheet(sheet: Sheet, file: Path) -> None:
    """Writes a PNG whole or not at all, in place of what is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    PIL.Image.fromarray(sheet).save(temporary, format="PNG")
    os.replace(temporary, file)
