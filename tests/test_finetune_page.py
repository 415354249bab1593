"""docs/finetune.md, followed literally, on twenty pictures."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_run import save_tiny_model

ROOT = pathlib.Path(__file__).parent.parent
PREAMBLE = f'set -eu\nsdjax() {{ "{sys.executable}" -m sdjax "$@"; }}\n'


def commands():
    page = (ROOT / "docs" / "finetune.md").read_text()
    return "".join(re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S))


def make_pictures(folder):
    noise = np.random.default_rng(0)
    folder.mkdir()
    for i in range(20):
        kind = ("png", "jpg")[i % 2]
        size = (int(noise.integers(10, 80)), int(noise.integers(10, 80)), 3)
        pixels = noise.integers(0, 256, size, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.{kind}")
        (folder / f"{i:02}.txt").write_text(f"a photo of my cat Mitzi, the {i}th")


@pytest.mark.slow
def test_the_page_leads_from_pictures_to_a_picture(tmp_path):
    make_pictures(tmp_path / "pictures")
    save_tiny_model(tmp_path / "tiny")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    settings = {"MODEL": "tiny", "STEPS": "3", "SDJAX_CACHE_DIR": str(tmp_path / "c")}
    done = subprocess.run(
        ["bash", "-c", PREAMBLE + commands()],
        cwd=tmp_path,
        env={**os.environ, **settings, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with Image.open(tmp_path / "mitzi.png") as image:
        assert image.size == (16, 16)
        assert "my cat Mitzi in the snow" in image.text["parameters"]
    lines = (tmp_path / "runs" / "mine" / "losses.jsonl").read_text().splitlines()
    assert len(lines) == 5
    versions = (tmp_path / "runs" / "mine" / "versions.jsonl").read_text()
    assert len(versions.splitlines()) == 2
