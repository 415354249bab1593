"""The command line with a model in its place that only remembers what it was asked."""

import dataclasses
import os
import sys
import time
import types
import warnings

import numpy as np
import pytest

import sdjax
from sdjax.cli.main import main
from sdjax.config import ModelConfig, ScheduleConfig
from sdjax.errors import SdjaxError
from sdjax.recipe import read_recipe

CONFIG = ModelConfig(schedule=ScheduleConfig(sampler="plms"))


@dataclasses.dataclass
class Fake:
    """Stands for `sdjax`: gray images, and a record of the calls."""

    loaded: list = dataclasses.field(default_factory=list)
    generated: list = dataclasses.field(default_factory=list)
    saved: list = dataclasses.field(default_factory=list)
    hash: str = "0123456789abcdef"
    error: BaseException | None = None
    warning: str | None = None

    def load(self, path, **options):
        if path == "missing":
            raise SdjaxError("missing is no model")
        self.loaded.append((path, options))
        return types.SimpleNamespace(config=CONFIG, params={}, hash=self.hash)

    def generate(self, prompts, *, num_images_per_prompt, height, width, **options):
        if self.error:
            raise self.error
        if self.warning:
            warnings.warn(self.warning, stacklevel=2)
        options |= {"height": height, "width": width}
        self.generated.append((prompts, num_images_per_prompt, options))
        shape = (len(prompts) * num_images_per_prompt, height or 8, width or 16, 3)
        return np.full(shape, options["seed"], np.uint8)

    def save(self, model, path, **options):
        self.saved.append((path, options))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A `Fake` in the command's place, in an empty working folder."""
    from sdjax.cli import convert, generate

    fake = Fake()
    module = types.SimpleNamespace(
        load=fake.load,
        generate=fake.generate,
        save=fake.save,
        __version__=sdjax.__version__,
    )
    monkeypatch.setattr(generate, "sdjax", module)
    monkeypatch.setattr(convert, "sdjax", module)
    monkeypatch.setattr(generate, "default_dtype", lambda model: "float32")
    monkeypatch.chdir(tmp_path)
    return fake


def run(capsys, *argv):
    """Returns exit status, standard output and standard error."""
    try:
        status = main([str(word) for word in argv])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def assert_error(outcome, message):
    status, out, err = outcome
    assert (status, out) == (2, "")
    assert err.startswith("sdjax: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["generate", "-m", "sd"], "no prompt"),
        (["generate", "a fox", "-m", "missing"], "missing is no model"),
        (["generate", "a fox", "-m", "sd", "--seed", "x"], "--seed"),
        (["generate", "a fox", "-m", "sd", "--guidance-scale", "nan"], "finite"),
        (["generate", "a fox", "-m", "sd", "-n", "0"], "1 or more"),
        (["generate", "a fox", "-m", "sd", "-n", "x"], "not 'x'"),
        (["generate", "a fox", "-m", "sd", "--steps", "0"], "1 or more, not '0'"),
        (["generate", "a fox", "-m", "sd", "--steps", "9" * 5000], "not '999"),
        (["generate", "a fox", "-m", "sd", "--height", "-8"], "1 or more"),
        (["generate", "a fox", "-m", "sd", "--seed", "-1"], "from 0 to 1844674407"),
        (["generate", "a fox", "-m", "sd", "--seed", str(2**64)], "from 0 to"),
        (["generate", "a fox", "-m", "sd", "--eta", "2"], "from 0 to 1"),
        (["generate", "a fox", "-m", "sd", "--guidance-rescale", "2"], "from 0 to 1"),
        (["generate", "a fox", "-m", "sd", "--guidance-scale", "x"], "finite"),
        (["generate", "a fox", "-m", "sd", "--sampler", "eulr"], "mean 'euler'"),
        (["generate", "a", "-m", "sd", "--sampler", "lms", "--eta", "0"], "no eta"),
        (["generate", "a fox", "-m", ""], "must not be empty"),
        (["generate", "a fox", "-m", "sd", "-o", ""], "must not be empty"),
        (["generate", "a fox", "-m", "sd", "-o", "gs://b/c"], "is a URL"),
        (["generate", "a fox", "-m", "sd", "-o", "a.avif"], "must end in .png"),
        (["generate", "a fox", "-m", "sd", "-o", "x" * 300 + ".png"], "too long"),
        (["convert", "sd", "new.ckpt"], "ends in .safetensors"),
        (["convert", "sd", "taken/in"], "cannot write"),
        (["convert", "sd", "x" * 300], "too long"),
        (["convert", "sd", "http://a/b", "--format", "orbax"], "cannot reach"),
        (["info", "http://a/b"], "cannot reach"),
        (["info", "taken"], "neither safetensors nor"),
        (["generate", "a fox", "-m", "sd", "--dtype", "int8"], "int8"),
        (["generate", "a fox", "-m", "sd", "-n", "2", "-o", "a.png"], "give a folder"),
        (["generate", "a", "b", "-m", "sd", "-o", "a.png"], "give a folder"),
        (["generate", "a fox", "-m", "sd", "-o", "a.jpg"], "must end in .png"),
        (["generate", "a fox", "-m", "sd", "-o", "no/a.png"], "cannot write no"),
        (["generate", "a fox", "-m", "sd", "-o", "taken/in"], "cannot make"),
        (["generate", "--from", "none.png"], "none.png"),
        (["generate", "--from", "taken"], "is not a PNG"),
        (["info", "none.png"], "none.png"),
        (["convert", "sd", "taken"], "exists already"),
    ],
)
def test_bad_input_is_one_line(fake, capsys, argv, message):
    with open("taken", "w") as file:
        file.write("something")
    assert_error(run(capsys, *argv), message)
    assert fake.generated == []
    assert os.listdir() == ["taken"]


def test_one_image_to_a_file(fake, capsys):
    with open("fox.png", "w") as file:
        file.write("old")
    status, out, err = run(capsys, "generate", "a fox", "-m", "models/sd", "-o=fox.png")
    assert (status, out, err) == (0, "fox.png\n", "")
    recipe = read_recipe("fox.png")
    assert recipe.prompt == "a fox"
    assert (recipe.model, recipe.model_hash) == ("models/sd", "0123456789abcdef")
    assert (recipe.height, recipe.width) == (8, 16)
    assert (recipe.sampler, recipe.dtype, recipe.storage_dtype) == (
        "plms",
        "float32",
        None,
    )
    assert recipe.negative_prompt is None


def test_many_images_to_a_folder(fake, capsys):
    argv = ["generate", "a fox", "a cat", "-n", 3, "-m", "sd", "-o", "new/out"]
    status, out, _ = run(capsys, *argv)
    assert status == 0
    paths = [os.path.join("new", "out", f"0000{i}.png") for i in range(6)]
    assert out.splitlines() == paths
    recipes = [read_recipe(path) for path in paths]
    assert [r.prompt for r in recipes] == ["a fox"] * 3 + ["a cat"] * 3
    assert [r.image_index for r in recipes] == list(range(6))
    (prompts, number, options) = fake.generated[0]
    assert (prompts, number) == (["a fox", "a cat"], 3)
    assert list(options["image_indices"]) == list(range(6))
    assert run(capsys, *argv)[1].splitlines()[0] == os.path.join("new/out", "00006.png")


def test_default_output_is_numbered_here(fake, capsys):
    argv = ["generate", "a fox", "-m", "sd", "--seed", 7]
    outputs = [run(capsys, *argv)[1] for _ in range(2)]
    assert outputs == ["sdjax-7-00000.png\n", "sdjax-7-00001.png\n"]


def test_every_option_arrives(fake, capsys):
    argv = (
        "generate fox -m sd --negative-prompt cat --height 24 --width 32 --steps 5 "
        "--guidance-scale 3 --guidance-rescale 0.7 --sampler ddim --eta 0.5 --seed 9 "
        "--clip-skip 1 --dtype bfloat16 --tokenizer tok --variant fp16 "
        "--prediction-type v_prediction --no-progress -o a.png"
    )
    assert run(capsys, *argv.split())[0] == 0
    loading = {"dtype": "bfloat16", "tokenizer": "tok", "variant": "fp16"}
    loading["prediction_type"] = "v_prediction"
    assert fake.loaded == [("sd", loading)]
    options = fake.generated[0][2]
    del options["model"]
    assert options | {"image_indices": [*options["image_indices"]]} == {
        "negative_prompt": "cat",
        "height": 24,
        "width": 32,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "guidance_rescale": 0.7,
        "sampler": "ddim",
        "eta": 0.5,
        "seed": 9,
        "clip_skip": 1,
        "dtype": "bfloat16",
        "image_indices": [0],
        "progress": False,
    }


def comparable(call):
    prompts, number, options = call
    options = {k: v for k, v in options.items() if k not in ("model", "progress")}
    return prompts, number, options | {"image_indices": [*options["image_indices"]]}


def test_from_makes_the_same_image_again(fake, capsys):
    argv = (
        "generate a b -n 2 -m sd --steps 5 --sampler euler_a --seed 3 --clip-skip 2 "
        "--negative-prompt x --dtype float16 --variant fp16 --height 24 -o out"
    )
    run(capsys, *argv.split())
    source = os.path.join("out", "00003.png")
    status, out, err = run(capsys, "generate", "--from", source, "-o", "again.png")
    assert (status, out, err) == (0, "again.png\n", "")
    assert read_recipe("again.png") == read_recipe(source)
    assert fake.loaded[1] == fake.loaded[0]
    prompts, number, options = comparable(fake.generated[1])
    first = comparable(fake.generated[0])[2]
    assert (prompts, number) == (["b"], 1)
    # The first run left the width to the model; its picture tells what it was.
    assert options == first | {"image_indices": [3], "width": 16}


def test_from_with_changes(fake, capsys):
    first = ["--seed", 3, "--sampler", "ddim", "-o", "a.png"]
    run(capsys, "generate", "a", "-m", "sd", *first)
    argv = ["generate", "c", "--from", "a.png", "--seed", 0, "--eta", 0, "-o", "b.png"]
    assert run(capsys, *argv)[0] == 0
    changed = {"prompt": "c", "seed": 0, "eta": 0.0}
    assert read_recipe("b.png") == dataclasses.replace(read_recipe("a.png"), **changed)


@pytest.mark.filterwarnings("default::UserWarning")
def test_from_warns_of_another_model(fake, capsys):
    run(capsys, "generate", "a", "-m", "sd", "-o", "a.png")
    fake.hash = "ffff"
    status, _, err = run(capsys, "generate", "--from", "a.png", "-o", "b.png")
    assert status == 0
    assert err.startswith(
        "sdjax: warning: a.png was made by the model 0123456789abcdef"
    )
    assert err.count("\n") == 1


@pytest.mark.filterwarnings("default::UserWarning")
def test_from_warns_of_another_version(fake, capsys, monkeypatch):
    run(capsys, "generate", "a", "-m", "sd", "-o", "a.png")
    from sdjax.cli import generate

    monkeypatch.setattr(generate.sdjax, "__version__", "9.9")
    _, _, err = run(capsys, "generate", "--from", "a.png", "-o", "b.png")
    made_by = f"sdjax: warning: a.png was made by sdjax {sdjax.__version__} with JAX"
    assert err.startswith(made_by)
    assert err.count("\n") == 1


def test_from_says_where_the_model_was(fake, capsys, monkeypatch):
    run(capsys, "generate", "a", "-m", "sd", "-o", "a.png")
    from sdjax.cli import generate

    def gone(path, **options):
        raise SdjaxError(f"{path} does not exist")

    monkeypatch.setattr(generate.sdjax, "load", gone)
    outcome = run(capsys, "generate", "--from", "a.png", "-o", "b.png")
    assert_error(outcome, "sd does not exist (the model of a.png; if it has moved")


def test_another_sampler_leaves_the_eta_of_the_first(fake, capsys):
    run(capsys, *"generate a -m sd --sampler ddim --eta 0.5 -o a.png".split())
    argv = "generate --from a.png --sampler dpmpp_2m -o b.png"
    assert run(capsys, *argv.split())[0] == 0
    assert fake.generated[1][2]["eta"] is None


def test_a_link_to_where_nothing_can_be_written(fake, capsys):
    os.symlink("no/such/place.png", "link.png")
    argv = ["generate", "a fox", "-m", "sd", "-o", "link.png"]
    assert_error(run(capsys, *argv), "cannot write")
    assert fake.generated == []


def test_ctrl_c_in_a_callback_that_drops_it(fake, capsys, monkeypatch):
    def load(*_, **__):
        dropped = KeyboardInterrupt()
        sys.unraisablehook(types.SimpleNamespace(exc_type=type(dropped)))
        time.sleep(5)

    monkeypatch.setattr(fake_module(fake), "load", load)
    status, _, err = run(capsys, "generate", "a fox", "-m", "sd")
    assert (status, err) == (130, "sdjax: interrupted\n")


def fake_module(fake):
    from sdjax.cli import generate

    return generate.sdjax


@pytest.mark.filterwarnings("default::UserWarning")
def test_warnings_are_one_line(fake, capsys):
    fake.warning = "the prompt is too long\nand loses: blue fox"
    _, out, err = run(capsys, "generate", "a", "-m", "sd", "-o", "a.png")
    assert out == "a.png\n"
    assert err == "sdjax: warning: the prompt is too long and loses: blue fox\n"


def test_ctrl_c_says_what_was_saved(fake, capsys, monkeypatch):
    fake.error = KeyboardInterrupt()
    outcome = run(capsys, "generate", "a", "-m", "sd", "-n", "2")
    assert outcome == (130, "", "sdjax: interrupted: 0 of 2 images saved\n")
    from sdjax.cli import generate

    fake.error = None
    save, calls = generate.save_numbered_png, []

    def save_once(*args, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return save(*args, **kwargs)

    monkeypatch.setattr(generate, "save_numbered_png", save_once)
    outcome = run(capsys, "generate", "a", "-m", "sd", "-n", "2")
    message = "sdjax: interrupted: 1 of 2 images saved\n"
    assert outcome == (130, "sdjax-0-00000.png\n", message)


@pytest.mark.parametrize(
    ("argv", "format"),
    [
        ([], "diffusers"),
        (["--format", "orbax"], "orbax"),
        ([".safetensors"], "single-file"),
        ([".safetensors", "--format", "diffusers"], "diffusers"),
    ],
)
def test_convert(fake, capsys, argv, format):
    suffix = argv.pop(0) if argv and argv[0].startswith(".") else ""
    loading = ["--dtype", "float16", "--variant", "fp16", "--tokenizer", "tok"]
    status, out, _ = run(capsys, "convert", "sd", f"new{suffix}", *argv, *loading)
    assert (status, out) == (0, f"new{suffix}\n")
    options = {"dtype": "float16", "variant": "fp16", "tokenizer": "tok"}
    assert fake.loaded == [("sd", options | {"prediction_type": None})]
    assert fake.saved == [(f"new{suffix}", {"format": format})]


def test_convert_into_a_folder_that_has_files(fake, capsys):
    os.mkdir("out")
    assert run(capsys, "convert", "sd", "out")[0] == 0
    with open("out/file", "w") as file:
        file.write("kept")
    assert_error(run(capsys, "convert", "sd", "out"), "out exists already")
