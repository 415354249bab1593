"""`sdjax train` with real networks, tiny ones."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_run import make_pictures, save_tiny_model

import sdjax
from sdjax.cli.main import main
from sdjax.training.run import Outcome
from sdjax.weights import read_autoencoder

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"
DIFFUSION = """
from sdjax.training.config import *
def get_config():
    return TrainConfig(
        init_from="tiny",
        data=DataConfig(path="pictures", batch_size=8, resolution=None),
        samples=SampleGridConfig(
            every_steps=2, prompts=("a", "b", "c"), num_inference_steps=1
        ),
        checkpoints=CheckpointConfig(every_steps=2),
        steps=2,
        log_every_steps=1,
    )
"""
AUTOENCODER = """
import sys; sys.path.insert(0, {tests!r})
from tiny_run import MODEL
from sdjax.training.config import *
def get_config():
    return TrainConfig(
        task="autoencoder",
        model=MODEL,
        data=DataConfig(path="pictures", batch_size=8, resolution=16),
        autoencoder=AutoencoderLossConfig(discriminator_weight=0.0),
        samples=SampleGridConfig(every_steps=2),
        steps=2,
    )
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(DIFFUSION)
    tests = str(pathlib.Path(__file__).parent)
    (tmp_path / "first.py").write_text(AUTOENCODER.format(tests=tests))
    make_pictures(tmp_path / "pictures")
    return tmp_path


def fails(capsys, *arguments):
    try:
        status = main(["train", *arguments])
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_is_wrong_is_one_line(place, capsys):
    assert "--workdir" in fails(capsys, "config.py")
    run = ("config.py", "--workdir", "run")
    assert "no file or folder tiny" in fails(capsys, *run)
    assert "did you mean steps" in fails(capsys, *run, "--set", "step=3")
    assert "cannot read the config x.py" in fails(capsys, "x.py", "--workdir", "run")
    scratch = ("--set", "init_from=none")
    assert "autoencoder_from is missing" in fails(capsys, *run, *scratch)
    first = ("first.py", "--workdir", "run2")
    nowhere = ("--set", "data.path=nowhere")
    assert "nowhere is not there" in fails(capsys, *first, *nowhere)
    odd = ("--set", "data.resolution=15")
    assert "must be a multiple of 2" in fails(capsys, *first, *odd)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_asked_to_stop_says_how_to_go_on(
    place, capsys, monkeypatch, number
):
    stopped = Outcome(7, number, None, 0.25, 1, {"a/b.tar": ["x", "y"]})
    monkeypatch.setattr("sdjax.cli.train.train", lambda *_, **__: stopped)
    try:
        status = main(["train", "config.py", "--workdir", "run"])
    except SystemExit as error:
        status = error.code
    assert status == 128 + number
    captured = capsys.readouterr()
    assert "step 7 is saved; the same command goes on from it" in captured.err
    assert "waited for data 25.0% of the time\n1 steps left out" in captured.err
    assert "2 pictures could not be read, in b.tar" in captured.err
    assert captured.out == ""


@pytest.mark.slow
def test_a_run_from_its_config_to_a_picture(place, capsys):
    save_tiny_model(place / "tiny")
    command = ["train", "config.py", "--workdir", "run", "--set", "data.flip=0.5"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == "run/model\n"
    assert "step 2 of 2: loss" in captured.err and "waited for data" in captured.err
    with Image.open("run/samples/00000002.png") as sheet:
        assert sheet.size == (2 * 16 + 2, 2 * 16 + 2)
    resolved = json.loads(pathlib.Path("run/config.json").read_text())["data"]
    assert (resolved["flip"], resolved["resolution"]) == (0.5, 16)
    trained, before = sdjax.load("run/model"), sdjax.load("tiny")
    kernel = lambda model, name: np.asarray(model.params[name]["conv_in"]["kernel"])
    assert not np.array_equal(kernel(trained, "unet"), kernel(before, "unet"))
    for name in ("encoder", "decoder"):
        np.testing.assert_array_equal(
            trained.params["vae"][name]["conv_in"]["kernel"],
            before.params["vae"][name]["conv_in"]["kernel"],
        )
    assert main(["info", "run", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["steps"] == "2 of 2" and described["checkpoints"] == "2"
    drawn = ["generate", "noise", "--model", "run/model", "--steps", "1", "-o", "x.png"]
    assert main(drawn) == 0
    os.rename("run/model/unet", "run/model/unet.bak")
    assert main(command) == 0  # finished: nothing is done again
    assert not os.path.exists("run/model/unet")
    assert main([*command, "--set", "steps=3"]) == 0
    assert os.path.exists("run/model/unet")
    capsys.readouterr()
    assert "data.flip was 0.5 and is now 0.0" in fails(capsys, *command[1:4])
    shutil.rmtree("tiny")
    save_tiny_model(place / "tiny", seed=1)
    said = fails(capsys, *command[1:], "--set", "steps=3")
    assert "text_encoder and vae of tiny changed since the run began" in said


@pytest.mark.slow
def test_an_autoencoder_from_scratch_serves_the_second_phase(place, capsys):
    assert main(["train", "first.py", "--workdir", "run"]) == 0
    with Image.open("run/samples/00000002.png") as sheet:
        assert sheet.size == (8 * 18 - 2, 2 * 18 - 2)
    config, params = read_autoencoder("run/model")
    assert config.scaling_factor != 0.18215
    assert config.latent_channels == 4 and "encoder" in params
    save_tiny_model(place / "tiny")
    second = ["train", "config.py", "--workdir", "second", "--set", "samples.prompts="]
    assert main([*second, "--set", "autoencoder_from=run/model"]) == 0
    trained = sdjax.load("second/model")
    assert trained.config.vae.scaling_factor == config.scaling_factor
    np.testing.assert_array_equal(
        trained.params["vae"]["encoder"]["conv_in"]["kernel"],
        params["encoder"]["conv_in"]["kernel"],
    )


@pytest.mark.slow
def test_killed_and_stopped_runs_end_with_the_same_bytes():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "kill_and_resume.py", "--repeats", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "1 repeats, 0 differences" in done.stdout
