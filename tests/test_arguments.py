"""Bad arguments are one sentence that names them, before anything is compiled."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from tiny import SD1, tiny_model

import sdjax
from sdjax import runner
from sdjax.errors import SdjaxError

NAN = float("nan")
SHAPE = (1, 8, 8, 4)


def prepare(prompt="a fox", **arguments):
    arguments = {"height": 64, "width": 64, "num_inference_steps": 2, **arguments}
    return sdjax.prepare(prompt, model=tiny_model(), **arguments)


BAD = {
    "height": [0, -8, 7, 100, 64.0, "64", True, NAN, 2**17, [64]],
    "num_inference_steps": [0, -1, 1001, 2.5, "3", True, NAN],
    "sampler": ["", "nope", 3, ["ddim"], b"ddim", "ddim_karras"],
    "guidance_scale": [NAN, float("inf"), 1e39, 10**400, "7.5", "", True, [7.5, 1]],
    "guidance_rescale": [NAN, -0.1, 1.1, None, "1"],
    "eta": [0.5, NAN, "1", [1]],
    "seed": [-1, 2**64, 1.5, "1", None, True, NAN],
    "key": [3, "k", np.zeros(2, np.float32), jax.random.split(jax.random.key(0), 2)],
    "num_images_per_prompt": [0, -1, 1.5, "2", None, 10**20],
    "image_indices": [[], [0, 1], [-1], [2**31], [0.5], ["a"], "0", 0, [None], [[0]]],
    "clip_skip": [-1, 50, 1.0, "1", None, NAN],
    "dtype": ["float64", "bf16", "int8", "", 3],
    "output_type": ["png", "", None, 3],
    "latents": [
        np.zeros(SHAPE[1:], np.float32),
        np.zeros((1, 4, 8, 8), np.float32),
        np.zeros(SHAPE, int),
        np.zeros(SHAPE, complex),
        np.full(SHAPE, NAN, np.float32),
        "x",
        [[1]],
    ],
    "negative_prompt": [[], 3, [3], b"x", ["a", "b"], {"a": 1}],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, row in BAD.items() for value in row]
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(SdjaxError, match=name.replace("_prompt", "")) as caught:
        prepare(**{name: value})
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("prompt", [[], None, 3, [None], b"a", [b"a"], {"a": 1}])
def test_bad_prompts(prompt):
    with pytest.raises(SdjaxError, match="prompt"):
        prepare(prompt)


def test_noise_for_too_few_rows():
    few = np.zeros((2, *SHAPE), np.float32)
    with pytest.raises(SdjaxError, match="noise has 2 rows, but the sampler takes"):
        prepare(noise=few, sampler="euler_a", num_inference_steps=4)
    prepare(noise=few, sampler="euler", num_inference_steps=4)  # adds none


def test_a_number_too_long_to_be_shown():
    with pytest.raises(SdjaxError, match="thousands of digits"):
        prepare(seed=10**5000)


def test_numbers_of_array_libraries_are_numbers():
    inputs, config = prepare(
        height=np.int64(64),
        seed=np.uint64(2**63),
        guidance_scale=np.float32(3),
        eta=None,
    )
    assert config.height == 64
    assert type(config.height) is int
    assert inputs.key.tolist() == [2**31, 0]
    assert inputs.guidance_scale.tolist() == [3.0]


def test_what_is_not_asked_for_suits_the_model():
    config = dataclasses.replace(SD1, guidance_scale=1.5, num_inference_steps=7)
    inputs, _ = sdjax.prepare("a", model=tiny_model(config), sampler="ddim")
    assert inputs.guidance_scale.tolist() == [1.5]
    assert inputs.tableau.num_rows == 7
    inputs, _ = sdjax.prepare("a", model=tiny_model(), sampler="ddim")
    assert inputs.guidance_scale.tolist() == [7.5]
    assert inputs.tableau.num_rows == 30


def test_latents_of_any_float_type_become_float32():
    for dtype in (np.float16, np.float64, jax.numpy.bfloat16):
        inputs, _ = prepare(latents=np.ones(SHAPE, dtype))
        assert inputs.latents.dtype == np.float32


def test_dtypes_as_numpy_and_jax_write_them():
    assert prepare(dtype=jax.numpy.bfloat16)[1].dtype == "bfloat16"
    assert prepare(dtype=np.dtype("float32"))[1].dtype == "float32"


@pytest.mark.parametrize("which", ["prompt", "negative prompt"])
def test_dropped_words_are_said_of_the_right_prompt(which):
    texts = {"prompt": "a fox", "negative_prompt": "a cat"}
    texts[which.replace(" ", "_")] = "x " * 200 + "the end"
    with pytest.warns(UserWarning, match=f"the {re.escape(which)} is longer.*the end"):
        prepare(**texts)


def test_what_cannot_fit_in_memory_is_said(monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(runner, "run_program", fail)
    with pytest.raises(SdjaxError, match="2 images of 64 x 72 in float32 need more"):
        sdjax.generate(["a", "b"], model=tiny_model(), height=64, width=72)


def test_models_of_the_wrong_type():
    with pytest.raises(SdjaxError, match="model is 3, but must be"):
        sdjax.generate("a", model=3)
