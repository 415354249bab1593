"""Draws the sheet of the README: 5×5 prompts with the bundled model.

python scripts/draw_bundled_model.py docs/emoji.png

The last row's combinations of subject and skin tone were not in the training data.
"""

import argparse
from pathlib import Path

import numpy as np

import sdjax
from sdjax.sheet import save_sheet, tile

PROMPTS = [
    *(
        "a slice of pizza",
        "red heart",
        "volcano",
        "a picture of a rocket",
        "angry face",
    ),
    *("cat face", "dog face", "panda", "tiger face", "a picture of an owl"),
    *("strawberry", "hamburger", "birthday cake", "hot beverage", "sushi"),
    *("sun", "snowman", "rainbow", "Christmas tree", "umbrella with rain drops"),
    "scientist light skin tone",
    "woman judge medium skin tone",
    "Santa Claus dark skin tone",
    "woman standing medium-dark skin tone",
    "ninja medium-light skin tone",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="a PNG, which is replaced")
    args = parser.parse_args()
    images = sdjax.generate(PROMPTS, seed=0)
    large = np.asarray(images).repeat(2, axis=1).repeat(2, axis=2)
    save_sheet(tile(large, 5), args.output)
    print(args.output)


if __name__ == "__main__":
    main()
