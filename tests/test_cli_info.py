"""`sdjax --help` and `sdjax info`."""

import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from sdjax import weights
from sdjax.cli.main import main
from sdjax.config import ModelConfig, ScheduleConfig, TextEncoderConfig
from sdjax.recipe import Recipe, save_png
from sdjax.weights import Description

CONFIG = ModelConfig(schedule=ScheduleConfig(sampler="plms"))
DESCRIPTION = Description(
    format="diffusers",
    config=CONFIG,
    parameters={"text_encoder": 123060480, "unet": 859520964, "vae": 83653863},
    tensors={"text_encoder": 196, "unet": 686, "vae": 248},
    dtypes={
        "text_encoder": ("float16",),
        "unet": ("float16", "float32"),
        "vae": ("float32",),
    },
    sha256="0123456789abcdef",
    ignored=("model_ema.decay",),
)
RECIPE = Recipe(
    **{"prompt": "a fox", "negative_prompt": None, "seed": 3, "image_index": 0},
    **{"height": 8, "width": 8, "num_inference_steps": 30, "guidance_scale": 7.5},
    **{"guidance_rescale": 0.0, "sampler": "ddim", "eta": None, "clip_skip": 0},
    **{"dtype": "float32", "storage_dtype": None, "model": "sd", "model_hash": None},
    **{"tokenizer": None, "variant": None, "prediction_type": None},
    **{"sdjax": "0.1.0", "jax": "0.10.2", "backend": "cpu"},
)


def info(capsys, *argv):
    status = main(["info", *map(str, argv)])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


def save(path, **changes):
    image = np.zeros((8, 8, 3), np.uint8)
    save_png(path, image, dataclasses.replace(RECIPE, **changes))


@pytest.mark.parametrize("command", [[], ["generate"], ["convert"], ["info"]])
def test_help_is_quick_and_imports_nothing_heavy(command):
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('sdjax', run_name='__main__', alter_sys=True)\n"
        "finally: print([m for m in ('jax', 'numpy', 'flax', 'transformers', 'PIL')"
        " if m in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        words = [sys.executable, "-c", code, *command, "--help"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: sdjax")
        assert done.stdout.endswith("[]\n")
    assert min(seconds) < 0.5


@pytest.fixture
def described(monkeypatch):
    """`sdjax.weights` that knows one model."""
    monkeypatch.setattr(weights, "describe", lambda path, variant: DESCRIPTION)


def test_info_of_a_model(described, capsys):
    out = info(capsys, "some/model")
    lines = dict(line.strip().split("  ", 1) for line in out.splitlines())
    lines = {name: value.strip() for name, value in lines.items()}
    assert lines["format"] == "diffusers"
    assert lines["sha256"] == "0123456789abcdef"
    assert lines["unet"] == "859,520,964 parameters, float16 float32"
    assert lines["total"] == "1,066,235,307 parameters"
    assert lines["width"] == "768, 12 layers, 12 heads"
    assert lines["heads"] == "8 8 8 8"
    assert lines["sampler"] == "plms"
    assert lines["ignored"].startswith("1 tensor")
    assert lines["betas"] == "scaled_linear from 0.00085 to 0.012, 1000 steps"


def test_info_of_a_model_in_json(described, capsys):
    data = json.loads(info(capsys, "some/model", "--json"))
    assert data["parameters"] == DESCRIPTION.parameters
    assert data["config"]["unet"]["context_dim"] == 768
    assert (data["path"], data["format"]) == ("some/model", "diffusers")


def test_info_of_the_refiner(capsys, monkeypatch):
    second = TextEncoderConfig(width=1280, num_layers=32, num_heads=20)
    refiner = dataclasses.replace(
        DESCRIPTION,
        config=dataclasses.replace(CONFIG, text_encoder=None, text_encoder_2=second),
        parameters={"text_encoder_2": 694659840},
        dtypes={"text_encoder_2": ("bfloat16",)},
    )
    monkeypatch.setattr(weights, "describe", lambda path, variant: refiner)
    out = info(capsys, "some/model")
    assert "text_encoder_2  694,659,840 parameters, bfloat16\n" in out
    assert "1280, 32 layers, 20 heads" in out


def test_info_of_an_image(tmp_path, capsys):
    save(tmp_path / "a.png")
    out = info(capsys, tmp_path / "a.png")
    assert "prompt               a fox\n" in out
    assert "negative_prompt      -\n" in out
    data = json.loads(info(capsys, tmp_path / "a.png", "--json"))
    assert data == dataclasses.asdict(RECIPE)


def test_output_that_nobody_reads_to_its_end(tmp_path):
    save(tmp_path / "a.png", prompt="x" * 500_000)
    words = [sys.executable, "-m", "sdjax", "info", str(tmp_path / "a.png")]
    with subprocess.Popen(words, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 0
