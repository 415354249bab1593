"""Folders and files that are no model, or a damaged one: one clear line each."""

import dataclasses
import functools
import importlib
import json
import os
import shutil
import types

import checkpoints
import numpy as np
import pytest
from checkpoints import SD1, SDXL, TOKENIZERS, draw
from safetensors.numpy import load_file, save_file

import sdjax
from sdjax import weights
from sdjax.errors import SdjaxError
from sdjax.weights.read import open_model

UNET = "unet/diffusion_pytorch_model.safetensors"
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole small diffusers folder."""
    place = tmp_path_factory.mktemp("whole") / "model"
    weights.write(place, SD1, draw(SD1), TOKENIZERS, format="diffusers")
    return place


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, tmp_path / "model")


def refused(path, *words):
    with pytest.raises(SdjaxError) as caught:
        weights.read(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    for word in words:
        assert word in message, message


def edit(file, **changes):
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, **changes}))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, ["UNet2DModel"]),
        ("model_index.json", {"vae": ["diffusers", "VQModel"]}, ["vae", "VQModel"]),
        ("model_index.json", {"unet": None}, ["no unet"]),
        (
            "model_index.json",
            {"_class_name": "FluxPipeline", "unet": [None, None]},
            ["FluxPipeline", "no Stable Diffusion"],
        ),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            ["text_encoder", "T5EncoderModel", "CLIPTextModel"],
        ),
        ("model_index.json", {"text_encoder": [None, None]}, ["text_encoder"]),
        ("unet/config.json", {"_class_name": "UNet3D"}, ["UNet3D"]),
        ("unet/config.json", {"act_fn": "gelu"}, ["act_fn", "'gelu'", "'silu'"]),
        ("unet/config.json", {"norm_eps": 1e-6}, ["norm_eps"]),
        ("unet/config.json", {"class_embed_type": "timestep"}, ["class_embed_type"]),
        ("unet/config.json", {"addition_embed_type": "image"}, ["addition_embed"]),
        ("unet/config.json", {"encoder_hid_dim": 64}, ["encoder_hid_dim", "64"]),
        (
            "unet/config.json",
            {"down_block_types": ["CrossAttnDownBlock2D", "KDownBlock2D"]},
            ["down_block_types", "KDownBlock2D"],
        ),
        ("unet/config.json", {"up_block_types": ["UpBlock2D"]}, ["up_block_types"]),
        ("unet/config.json", {"block_out_channels": [32, "64"]}, ["block_out"]),
        ("unet/config.json", {"block_out_channels": []}, ["block_out_channels"]),
        ("unet/config.json", {"layers_per_block": 10**9}, ["layers_per_block"]),
        ("unet/config.json", {"attention_head_dim": 7}, ["attention_head_dim", "7"]),
        ("unet/config.json", {"norm_num_groups": 33}, ["norm_num_groups", "33"]),
        ("unet/config.json", {"cross_attention_dim": 65}, ["attn2", "(32, 64)"]),
        ("unet/config.json", {"in_channels": 9}, ["conv_in.weight", "(32, 9, 3, 3)"]),
        ("vae/config.json", {"act_fn": "relu"}, ["act_fn"]),
        ("vae/config.json", {"shift_factor": 0.1}, ["shift_factor"]),
        ("vae/config.json", {"scaling_factor": "big"}, ["scaling_factor", "'big'"]),
        ("vae/config.json", {"latent_channels": 16}, ["conv"]),
        ("text_encoder/config.json", {"hidden_act": "relu"}, ["hidden_act", "'relu'"]),
        ("text_encoder/config.json", {"hidden_size": 0}, ["hidden_size"]),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, ["lacks 16 tensors"]),
        ("text_encoder/config.json", {"num_hidden_layers": 1}, ["16 unknown tensors"]),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, ["sigmoid"]),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}, ["beta_start"]),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, ["flow"]),
        ("scheduler/scheduler_config.json", {"steps_offset": -1}, ["steps_offset"]),
        ("scheduler/scheduler_config.json", {"trained_betas": [2]}, ["trained_betas"]),
    ],
)
def test_configs_that_are_not_taken(folder, file, changes, words):
    edit(folder / file, **changes)
    refused(folder, *words)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        UNET,
    ],
)
def test_files_that_are_missing_or_nonsense(folder, file):
    place = folder / file
    for text in (b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000):
        place.write_bytes(text)
        refused(folder, str(place))
    place.unlink()
    refused(folder, "model_index.json" if "index" in file else file.split("/")[0])
    place.mkdir()
    refused(folder)


def test_a_missing_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")
    refused(folder, "tokenizer", "missing")


def test_a_tokenizer_that_is_given_stands_in(folder):
    shutil.move(folder / "tokenizer", folder / "elsewhere")
    model = sdjax.load(folder, tokenizer=folder / "elsewhere")
    assert "vocab.json" in model.tokenizer_files["tokenizer"]
    assert weights.describe(folder).sha256


def test_names_that_do_not_exist(folder):
    with pytest.raises(SdjaxError, match="dtype is 'fp8'; it can be float32"):
        sdjax.load(folder, dtype="fp8")
    with pytest.raises(SdjaxError, match="prediction_type is 'v'; it can be epsilon"):
        sdjax.load(folder, prediction_type="v")


def test_tensors_too_few_and_too_many(folder):
    edit_tensors(folder / UNET, lambda t: t.pop("conv_in.bias"))
    refused(folder, "lacks 1 tensors: conv_in.bias")
    names = {f"extra.{i:02}": np.zeros(1, np.float32) for i in range(20)}
    edit_tensors(folder / UNET, lambda t: t.update(names))
    refused(folder, "lacks 1 tensors", "20 unknown tensors: extra.00", "extra.09, ...")


def test_tensors_of_the_wrong_kind(folder):
    good = (folder / UNET).read_bytes()
    key = "conv_in.bias"
    edit_tensors(folder / UNET, lambda t: t.update({key: np.zeros(5, np.float32)}))
    refused(folder, key, "(5,)", "(32,)")
    (folder / UNET).write_bytes(good)
    edit_tensors(folder / UNET, lambda t: t.update({key: np.zeros(32, np.int32)}))
    refused(folder, key, "int32")
    (folder / UNET).write_bytes(good[:-100])
    refused(folder, UNET)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "..", "", ".", 7, "a/b", "a\\b"]
)
def test_an_index_stays_in_its_folder(folder, name):
    shutil.copy(folder / UNET, folder / "secret.safetensors")
    (folder / UNET).rename(folder / "unet" / "shard.safetensors")
    keys = load_file(folder / "unet" / "shard.safetensors")
    text = json.dumps({"weight_map": dict.fromkeys(keys, name)})
    (folder / INDEX).write_text(text)
    refused(folder, "is not a file beside it")


def test_indices_that_lie(folder):
    shard = folder / "unet" / "shard.safetensors"
    (folder / UNET).rename(shard)
    weight_map = dict.fromkeys(load_file(shard), shard.name)
    for bad, words in (
        ({}, "weight_map"),
        ({"conv_in.bias": "absent.safetensors"}, "which is missing"),
        ({**weight_map, "nothing": shard.name}, "does not hold 'nothing'"),
        ({"conv_in.bias": shard.name}, "does not list"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": bad}))
        refused(folder, words)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    weights.read(folder)
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(folder, "shard.safetensors")


def test_paths_that_are_no_model(tmp_path):
    refused(tmp_path / "absent", "there is no file or folder")
    refused(tmp_path, "model_index.json")
    refused(tmp_path / ("x" * 5000), "cannot read")
    refused("nul\0byte")


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        (["lora_unet_mid_block.lora_down.weight"], "a LoRA"),
        (["conv_in.weight"], "a part of a diffusers folder"),
        (["first_stage_model.encoder.conv_in.weight"], "an autoencoder alone"),
        (["text_model.final_layer_norm.weight"], "a text encoder alone"),
        (["anything"], "no Stable Diffusion checkpoint"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "lacks"),
    ],
)
def test_single_files_that_are_no_whole_model(tmp_path, keys, word):
    file = tmp_path / "file.safetensors"
    save_file({key: np.zeros((4, 4, 3, 3), np.float32) for key in keys}, file)
    refused(file, str(file), word)


def test_single_files_with_a_part_missing(tmp_path):
    file = tmp_path / "file.safetensors"
    tensors = checkpoints.original_tensors(SDXL, draw(SDXL))
    for prefix in ("first_stage_model.", "conditioner.embedders.0.", "conditioner."):
        kept = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
        save_file(kept, file)
        refused(file, str(file))
    for key in list(tensors)[:: len(tensors) // 60]:
        save_file({k: v for k, v in tensors.items() if k != key}, file)
        refused(file, str(file))
        scalar = {key: np.zeros((), np.float32)}
        save_file({**tensors, **scalar}, file)
        refused(file, str(file))


def test_metadata_that_lies(tmp_path):
    file = tmp_path / "file.safetensors"
    tensors = checkpoints.original_tensors(SD1, draw(SD1))
    good = dataclasses.asdict(SD1)
    for unet in (
        {"layers_per_block": 10**6},
        {"layers_per_block": "two"},
        {"block_out_channels": [32]},
        {"block_out_channels": 32},
        {"transformer_depth": [10**6, 0]},
        {"vector": "class_embedding"},
        {"wings": 2},
    ):
        text = json.dumps({**good, "unet": {**good["unet"], **unet}})
        save_file(tensors, file, {"sdjax": text})
        refused(file, str(file))
    for text in ("", "{", "[]", '{"unet": 7}', '{"sample_size": []}', "[" * 100_000):
        save_file(tensors, file, {"sdjax": text})
        refused(file, str(file))


BAD_VALUES = [None, -1, 0, 1, 10**9, 0.5, "x", [], {}, True, [[1]], [1, 2], [-1, "x"]]


def test_every_key_of_every_config_with_every_bad_value(folder):
    """Each is refused in one line, or means what diffusers' default means."""
    for name in ("model_index.json", "unet/config.json", "vae/config.json",
                 "text_encoder/config.json", "scheduler/scheduler_config.json",
                 "tokenizer/tokenizer_config.json"):  # fmt: skip
        file = folder / name
        good = file.read_bytes()
        for key in json.loads(good):
            for value in BAD_VALUES:
                edit(file, **{key: value})
                try:
                    open_model(folder)
                except SdjaxError as error:
                    assert "\n" not in str(error)
        file.write_bytes(good)


def test_damaged_orbax_folders(tmp_path):
    place = tmp_path / "model"
    weights.write(place, SD1, draw(SD1), TOKENIZERS, format="orbax")
    weights.read(place)
    config = place / "sdjax.json"
    good = config.read_text()
    for bad in ("", "[]", '{"version": 9}', '{"version": 1}', good.replace("64", "65")):
        config.write_text(bad)
        refused(place, str(place))
    config.write_text(good)
    shutil.rmtree(place / "params")
    refused(place, str(place))


def test_writing_over_a_link_or_a_rival(tmp_path, monkeypatch):
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    single = functools.partial(weights.write, format="single-file")
    with pytest.raises(SdjaxError, match="exists already"):
        single(tmp_path / "link.safetensors", SD1, draw(SD1), {})
    assert (tmp_path / "link.safetensors").is_symlink()
    rival = tmp_path / "rival.safetensors"
    write = importlib.import_module("sdjax.weights.write")
    # Another process writes the file after it was found to be free.
    monkeypatch.setattr(write, "check_destination", lambda *_: rival.write_text("mine"))
    with pytest.raises(SdjaxError, match="File exists"):
        single(rival, SD1, draw(SD1), {})
    assert rival.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["link.safetensors", "rival.safetensors"]


@pytest.mark.parametrize("form", ["diffusers", "single-file", "orbax"])
def test_a_disk_that_is_too_small_is_said_before_writing(tmp_path, monkeypatch, form):
    usage = types.SimpleNamespace(total=10**9, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SdjaxError, match="GB left"):
        weights.write(tmp_path / "m", SD1, draw(SD1), {}, format=form)
    assert os.listdir(tmp_path) == []


def test_what_tensorstore_raises_on_a_full_disk(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand more")

    checkpointer = importlib.import_module("orbax.checkpoint").PyTreeCheckpointer
    monkeypatch.setattr(checkpointer, "save", fail)
    with pytest.raises(SdjaxError, match=r"the disk is full$"):
        weights.write(tmp_path / "m", SD1, draw(SD1), {}, format="orbax")
    assert os.listdir(tmp_path) == []


def test_writing_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for form in ("diffusers", "single-file", "orbax"):
        with pytest.raises(SdjaxError, match="cannot write"):
            weights.write(tmp_path / "file" / "model", SD1, draw(SD1), {}, format=form)
    with pytest.raises(SdjaxError, match="format is 'onnx'"):
        weights.write(tmp_path / "m", SD1, draw(SD1), {}, format="onnx")
    with pytest.raises(SdjaxError, match="only Orbax"):
        weights.write("gs://b/m", SD1, draw(SD1), {}, format="diffusers")
