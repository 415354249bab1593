"""The recipe in a PNG: round trips, A1111's text, and what is no recipe."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sdjax.errors import SdjaxError
from sdjax.recipe import (
    Recipe,
    a1111_text,
    from_json,
    read_recipe,
    sampler_display_name,
    save_png,
    to_json,
)

RECIPE = Recipe(
    prompt="a photo, of: a\nfox 日本 🙂",
    negative_prompt="blurry",
    seed=0,
    image_index=0,
    height=512,
    width=768,
    num_inference_steps=30,
    guidance_scale=7.5,
    guidance_rescale=0.0,
    sampler="dpmpp_2m_karras",
    eta=None,
    clip_skip=1,
    dtype="float32",
    storage_dtype=None,
    model="models/v1-5, pruned.safetensors",
    model_hash="6ce0161689b3853a",
    tokenizer=None,
    variant=None,
    prediction_type=None,
    sdjax="0.1.0",
    jax="0.10.2",
    backend="cpu",
)
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


def parse_infotext(text):
    """Reads A1111's format by hand: prompt, negative prompt, comma-separated pairs."""
    *prompts, last = text.split("\n")
    prompt, _, negative = "\n".join(prompts).partition("\nNegative prompt: ")
    pairs = {}
    while last:
        key, _, rest = last.partition(": ")
        if rest.startswith('"'):
            value, end = json.JSONDecoder().raw_decode(rest)
            last = rest[end:].removeprefix(", ")
        else:
            value, _, last = rest.partition(", ")
        pairs[key] = value
    return prompt, negative, pairs


def test_infotext_is_that_of_a1111():
    prompt, negative, pairs = parse_infotext(a1111_text(RECIPE))
    assert prompt == RECIPE.prompt
    assert negative == RECIPE.negative_prompt
    assert pairs == {
        "Steps": "30",
        "Sampler": "DPM++ 2M Karras",
        "CFG scale": "7.5",
        "Seed": "0",
        "Size": "768x512",
        "Model hash": "6ce0161689",
        "Model": "v1-5, pruned",
        "Clip skip": "2",
        "Version": "sdjax 0.1.0",
    }


def test_infotext_to_the_letter():
    recipe = dataclasses.replace(
        RECIPE, prompt="a fox", negative_prompt="", clip_skip=0, model="sd/v1-5/"
    )
    assert a1111_text(recipe) == (
        "a fox\nSteps: 30, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 0, "
        "Size: 768x512, Model hash: 6ce0161689, Model: v1-5, Version: sdjax 0.1.0"
    )


def test_infotext_leaves_out_what_is_off_and_shows_what_is_on():
    on = dataclasses.replace(RECIPE, eta=0.25, guidance_rescale=0.7, image_index=3)
    pairs = parse_infotext(a1111_text(on))[2]
    assert (pairs["Eta"], pairs["CFG rescale"], pairs["Batch pos"]) == (
        "0.25",
        "0.7",
        "3",
    )
    off = dataclasses.replace(RECIPE, model_hash=None, negative_prompt=None)
    text = a1111_text(off)
    assert "Model hash" not in text
    assert "Negative prompt" not in text


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        ("euler_a", "Euler a"),
        ("dpm2_a_karras", "DPM2 a Karras"),
        ("dpmpp_3m_sde_exponential", "DPM++ 3M SDE Exponential"),
        ("ddim", "DDIM"),
        ("brand_new", "brand_new"),
    ],
)
def test_sampler_names(sampler, name):
    assert sampler_display_name(sampler) == name


@pytest.mark.parametrize("prompt", ["", "\0\ud800", "x" * 300_000, "a\r\nb", "é"])
def test_png_round_trip(tmp_path, prompt):
    recipe = dataclasses.replace(RECIPE, prompt=prompt, seed=2**63)
    save_png(tmp_path / "a.png", IMAGE, recipe)
    assert read_recipe(tmp_path / "a.png") == recipe
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), IMAGE)
        text = image.text["parameters"]
    assert text.endswith("Version: sdjax 0.1.0")


def test_json_round_trip_and_whole_numbers():
    assert from_json(to_json(RECIPE)) == RECIPE
    data = json.loads(to_json(RECIPE)) | {"guidance_scale": 7}
    assert from_json(json.dumps(data)).guidance_scale == 7


def changed(**changes) -> str:
    return json.dumps(json.loads(to_json(RECIPE)) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no JSON object"),
        ("{}", "without 'prompt'"),
        (changed(colour="red"), "unknown field 'colour'"),
        (changed(seed="0"), "'seed' is '0'"),
        (changed(seed=True), "'seed' is True"),
        (changed(seed=1.5), "'seed' is 1.5"),
        (changed(prompt=None), "'prompt' is None"),
        (changed(guidance_scale=float("nan")), "'guidance_scale' is nan"),
        (changed(guidance_scale=10**400), "'guidance_scale' is 1000"),
        (changed(eta=[0]), "'eta' is"),
    ],
)
def test_bad_recipes(text, message):
    with pytest.raises(SdjaxError, match=message) as error:
        from_json(text, "a.png")
    assert str(error.value).startswith("a.png")
    assert len(str(error.value)) < 300


def test_images_without_a_recipe(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "plain.png")
    Image.fromarray(IMAGE).save(tmp_path / "photo.jpg")
    (tmp_path / "empty.png").write_bytes(b"")
    text = PngImagePlugin.PngInfo()
    text.add_text("sdjax", "{}", zip=True)
    Image.fromarray(IMAGE).save(tmp_path / "foreign.png", pnginfo=text)
    bomb = PngImagePlugin.PngInfo()
    bomb.add_text("sdjax", "x" * 2**24, zip=True)
    Image.fromarray(IMAGE).save(tmp_path / "bomb.png", pnginfo=bomb)
    for name, message in {
        "plain.png": "carries no recipe",
        "photo.jpg": "is not a PNG",
        "empty.png": "is not a PNG",
        "foreign.png": "has a recipe without 'prompt'",
        "bomb.png": "is a damaged PNG",
        "none.png": "No such file",
        ".": "Is a directory",
    }.items():
        with pytest.raises(SdjaxError, match=message):
            read_recipe(tmp_path / name)


def test_damaged_pngs_are_one_sentence(tmp_path):
    save_png(tmp_path / "a.png", IMAGE, RECIPE)
    whole = (tmp_path / "a.png").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(whole[: rng.integers(len(whole) + 1)])
        for at in rng.integers(len(damaged), size=3) if damaged else ():
            damaged[at] = rng.integers(256)
        (tmp_path / "b.png").write_bytes(damaged)
        try:
            read_recipe(tmp_path / "b.png")
        except SdjaxError as error:
            assert "\n" not in str(error)
