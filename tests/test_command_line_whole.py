"""The command line with a real model: nothing is replaced."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny import SD1, numpy_model

import sdjax
from sdjax.cli.main import main
from sdjax.text import byte_vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    sdjax.save(numpy_model(SD1), path)
    return path


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def test_an_image_is_made_again_from_its_recipe(folder, tmp_path, capsys):
    settings = ["--steps", 3, "--seed", 7, "--sampler", "euler_a", "-n", 2]
    out = run(capsys, "generate", "a fox", "-m", folder, *settings, "-o", tmp_path)
    first, second = out.split()
    assert not np.array_equal(pixels(first), pixels(second))
    again = tmp_path / "again.png"
    run(capsys, "generate", "--from", second, "-o", again)
    difference = pixels(again).astype(int) - pixels(second)
    assert np.max(np.abs(difference)) <= 1  # another batch size rounds differently
    recipe = json.loads(run(capsys, "info", again, "--json"))
    assert "a fox" in json.dumps(recipe)
    with Image.open(again) as image:
        assert "Sampler: Euler a" in image.text["parameters"]


def test_any_format_draws_the_same(folder, tmp_path, capsys):
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    for name, data in byte_vocabulary().items():
        (vocabulary / name).write_bytes(data)
    single, orbax = tmp_path / "model.safetensors", tmp_path / "orbax"
    run(capsys, "convert", folder, single)
    run(capsys, "convert", single, orbax, "--format", "orbax")
    drawn = []
    for number, model in enumerate([folder, single, orbax]):
        output = tmp_path / f"{number}.png"
        shared = ["--steps", 2, "--tokenizer", vocabulary, "-o", output]
        run(capsys, "generate", "a fox", "-m", model, *shared)
        drawn.append(pixels(output))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


@pytest.mark.filterwarnings("default")  # the command line shows it
def test_a_long_prompt_says_which_words_are_dropped(folder, tmp_path, capsys):
    prompt = "fox " * 30 + "unheard"
    output = tmp_path / "fox.png"
    status = main(
        ["generate", prompt, "-m", str(folder), "--steps", "1", "-o", str(output)]
    )
    assert status == 0
    warning = [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert len(warning) == 1 and "unheard" in warning[0]
