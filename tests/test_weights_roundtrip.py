"""Checkpoints out and in again: every tensor equal to the byte, in every format."""

import dataclasses
import json

import checkpoints
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import ALL, DTYPES, SD1, SD2_WHOLE, TOKENIZERS, assert_same, draw
from safetensors.numpy import load_file, save_file

from sdjax import weights
from sdjax.errors import SdjaxError
from sdjax.weights.folder_write import folder_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")


def write(path, config, params, form, **options):
    weights.write(path, config, params, TOKENIZERS, format=form, **options)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("form", ["diffusers", "single-file"])
def test_every_family(tmp_path, name, form):
    config = ALL[name]
    params = draw(config)
    write(tmp_path / "model", config, params, form)
    got = weights.read(tmp_path / "model")
    if name == "sd2_whole" and form == "diffusers":
        config = folder_config(config)
        del params["text_encoder"]["text_projection"]
        del params["text_encoder"]["encoder"]["layers_2"]
    pads = dataclasses.replace if form == "diffusers" else None
    if pads and config.text_encoder is not None:
        # The folder's tokenizer says what it pads with.
        tower = pads(config.text_encoder, pad_token_id=49407)
        config = pads(config, text_encoder=tower)
    assert got.config == config
    assert_same(got.params, params)
    assert got.tokenizers == (TOKENIZERS if form == "diffusers" else {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["diffusers", "single-file", "orbax"])
def test_every_dtype(tmp_path, dtype, form):
    params = draw(SD1, dtype)
    write(tmp_path / "model", SD1, params, form)
    got = weights.read(tmp_path / "model")
    assert_same(got.params, params)
    assert got.config == SD1


@pytest.mark.parametrize("form", ["diffusers", "single-file", "orbax"])
def test_what_suits_a_model_in_sampling(tmp_path, form):
    config = dataclasses.replace(SD1, guidance_scale=1.5, num_inference_steps=25)
    write(tmp_path / "model", config, draw(SD1), form)
    got = weights.read(tmp_path / "model").config
    assert (got.guidance_scale, got.num_inference_steps) == (1.5, 25)


def test_across_formats(tmp_path):
    params, at = draw(SD1, np.float16), None
    for number, form in enumerate(
        ["single-file", "diffusers", "orbax", "single-file", "orbax", "diffusers"]
    ):
        got = weights.read(at) if at else weights.Checkpoint(SD1, params, TOKENIZERS)
        at = tmp_path / str(number)
        weights.write(at, got.config, got.params, TOKENIZERS, format=form)
    assert_same(weights.read(at).params, params)


@pytest.mark.parametrize("name", ALL)
def test_a_foreign_single_file_comes_back_to_the_byte(tmp_path, name):
    config = ALL[name]
    source, copy = tmp_path / "source.safetensors", tmp_path / "copy.safetensors"
    checkpoints.save_original(source, config, draw(config))
    got = weights.read(source)
    write(copy, got.config, got.params, "single-file")
    before, after = load_file(source), load_file(copy)
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert array.shape == after[key].shape
        assert array.tobytes() == after[key].tobytes()


def test_the_last_block_of_a_whole_tower_is_not_lost_in_a_single_file(tmp_path):
    file = tmp_path / "whole.safetensors"
    checkpoints.save_original(file, SD2_WHOLE, draw(SD2_WHOLE))
    got = weights.read(file)
    assert got.config.text_encoder == SD2_WHOLE.text_encoder
    assert "layers_2" in got.params["text_encoder"]["encoder"]


def test_shards(tmp_path):
    params = draw(SD1)
    write(tmp_path / "model", SD1, params, "diffusers", shard_size=400_000)
    folder = tmp_path / "model" / "unet"
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values())
    assert len(files) > 3
    assert all((folder / file).stat().st_size < 700_000 for file in files)
    assert_same(weights.read(tmp_path / "model").params, params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cast_on_the_way_in_and_out(tmp_path, dtype):
    params = draw(SD1)
    write(tmp_path / "wide", SD1, params, "single-file")
    write(tmp_path / "narrow", SD1, params, "diffusers", dtype=jnp.dtype(dtype))
    narrow = weights.read(tmp_path / "wide", dtype=jnp.dtype(dtype))
    assert_same(narrow.params, draw(SD1, jnp.dtype(dtype)))
    assert_same(weights.read(tmp_path / "narrow").params, narrow.params)


def test_variant(tmp_path):
    params = draw(SD1, np.float16)
    write(tmp_path / "model", SD1, params, "diffusers")
    for file in (tmp_path / "model").glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    with pytest.raises(SdjaxError, match="variant='fp16'"):
        weights.read(tmp_path / "model")
    assert_same(weights.read(tmp_path / "model", variant="fp16").params, params)
    with pytest.raises(SdjaxError, match="variant"):
        weights.read(tmp_path / "model", variant="ema")


def test_old_spellings_of_attention(tmp_path):
    params = draw(SD1)
    write(tmp_path / "model", SD1, params, "diffusers")
    file = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, array in load_file(file).items():
        for new, name in old.items():
            if f".{new}." in key:
                key = key.replace(f".{new}.", f".{name}.")
                # Old files have 1x1 convolutions here.
                array = array[:, :, None, None] if array.ndim == 2 else array
        tensors[key] = array
    save_file(tensors, file)
    text = tmp_path / "model" / "text_encoder" / "model.safetensors"
    tensors = {k.removeprefix("text_model."): v for k, v in load_file(text).items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
    save_file(tensors, text)
    assert_same(weights.read(tmp_path / "model").params, params)


def test_single_files_of_other_tools(tmp_path):
    params = draw(SD1)
    tensors = checkpoints.original_tensors(SD1, params)
    tower = "cond_stage_model.transformer."
    tensors = {k.replace(f"{tower}text_model.", tower): v for k, v in tensors.items()}
    extra = {
        f"{tower}embeddings.position_ids": np.arange(77)[None],
        "alphas_cumprod": np.ones(1000, np.float32),
        "model_ema.decay": np.ones((), np.float32),
        "first_stage_model.loss.logvar": np.zeros((), np.float32),
        "scale_factor": np.array(0.5, np.float32),
    }
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    got = weights.read(tmp_path / "model.safetensors")
    assert_same(got.params, params)
    assert len(got.ignored) == len(extra)
    assert got.config.vae.scaling_factor == 0.5


def test_describe_is_the_same_in_both_folders(tmp_path):
    params = draw(SD1, ml_dtypes.bfloat16)
    for form in ("diffusers", "orbax", "single-file"):
        write(tmp_path / form, SD1, params, form)
        assert weights.detect(tmp_path / form) == form
    one, other, file = (
        weights.describe(tmp_path / form)
        for form in ("diffusers", "orbax", "single-file")
    )
    assert dataclasses.replace(one, format="orbax") == other
    assert one.parameters == file.parameters
    assert one.dtypes["unet"] == ("bfloat16",)
    assert one.tensors["unet"] == len(checkpoints.flat(params["unet"]))
    assert one.sha256.startswith(one.hash) and len(one.hash) == 10


def test_nothing_is_overwritten(tmp_path):
    params = draw(SD1)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("precious")
    for form in ("diffusers", "single-file", "orbax"):
        for name in ("file", "folder"):
            with pytest.raises(SdjaxError, match="exists already"):
                write(tmp_path / name, SD1, params, form)
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_wrong_tree_is_not_written(tmp_path):
    params = draw(SD1)
    del params["unet"]["conv_in"]["bias"]
    with pytest.raises(SdjaxError, match="conv_in/bias"):
        write(tmp_path / "model", SD1, params, "diffusers")
    params = draw(SD1)
    params["unet"]["conv_in"]["bias"] = jnp.zeros(7)
    with pytest.raises(SdjaxError, match=r"\(7,\)"):
        write(tmp_path / "model", SD1, params, "orbax")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    params = draw(SD1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        for form in ("diffusers", "single-file"):
            with pytest.raises(SdjaxError, match="the disk is full"):
                write(tmp_path / "model", SD1, params, form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite(tmp_path):
    for bad in (np.nan, np.inf):
        params = draw(SD1)
        kernel = np.array(params["unet"]["conv_out"]["kernel"])
        kernel[0, 0, 0, 0] = bad
        params["unet"]["conv_out"]["kernel"] = jnp.asarray(kernel)
        for form in ("diffusers", "single-file", "orbax"):
            place = tmp_path / f"{form}-{bad}"
            write(place, SD1, params, form)
            with pytest.raises(SdjaxError, match=r"conv_out.*NaN"):
                weights.read(place)
    params["unet"]["conv_out"]["kernel"] = jnp.full((3, 3, 32, 4), 1e6)
    write(tmp_path / "large", SD1, params, "single-file")
    with pytest.raises(SdjaxError, match=r"conv_out.*too large for float16"):
        weights.read(tmp_path / "large", dtype=np.float16)
