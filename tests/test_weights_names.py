"""The name tables against the networks, recorded torch models and published facts."""

import gzip
import json
import math
import pathlib

import checkpoints
import jax
import pytest

from sdjax import presets
from sdjax.models import abstract_params
from sdjax.weights import layout
from sdjax.weights.single_config import infer_config
from sdjax.weights.tensors import Tensor

PRESETS = {
    name: value
    for name, value in vars(presets).items()
    if name[0] in "SLX" and type(value) is presets.ModelConfig
}
RECORDED = pathlib.Path(__file__).parent / "recorded" / "torch_keys.json.gz"
# Keys by which other loaders tell the families apart, so known to be right.
LANDMARKS = {
    "SD15": [
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
    ],
    "SD2": [
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
        "cond_stage_model.model.token_embedding.weight",
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias",
    ],
    "SDXL_BASE": [
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
        "conditioner.embedders.1.model.positional_embedding",
        "conditioner.embedders.1.model.text_projection",
        "model.diffusion_model.label_emb.0.2.bias",
        "model.diffusion_model.output_blocks.2.2.conv.weight",
    ],
    "SDXL_REFINER": [
        "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias",
        "conditioner.embedders.0.model.text_projection",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
    ],
    "X4_UPSCALER": [
        "model.diffusion_model.input_blocks.10.0.skip_connection.bias",
        "model.diffusion_model.label_emb.weight",
    ],
}


def originals(config):
    """Key of a single file -> shape."""
    return {
        layout.original_prefix(config, component) + entry.original: entry.original_shape
        for component, entries in layout.tables(config).items()
        for entry in entries
    }


def meta(shapes, tmp_path):
    """Tensors with shapes and no file."""
    dtype = checkpoints.np.dtype("f4")
    return {k: Tensor(tmp_path, 0, dtype, tuple(s)) for k, s in shapes.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_three_names_that_are_each_unique(name):
    config = PRESETS[name]
    tables = layout.tables(config)
    for entries in tables.values():
        for names in ({e.key for e in entries}, {e.path for e in entries}):
            assert len(names) == len(entries)
    parts = [
        (layout.original_prefix(config, component) + e.original, e.part)
        for component, entries in tables.items()
        for e in entries
    ]
    assert len(set(parts)) == len(parts)


@pytest.mark.parametrize("config", checkpoints.ALL.values(), ids=checkpoints.ALL)
def test_leaves_are_those_of_the_networks(config):
    trees = abstract_params(config)
    tables = layout.tables(config)
    assert trees.keys() == tables.keys()
    for component, entries in tables.items():
        found = {
            tuple(part.key for part in path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(trees[component])
        }
        assert found == {entry.path: entry.leaf_shape for entry in entries}


@pytest.mark.parametrize(
    "name", ["SD15", "SD2", "SDXL_BASE", "SDXL_REFINER", "X4_UPSCALER"]
)
def test_recorded_keys_of_torch(name):
    recorded = json.loads(gzip.decompress(RECORDED.read_bytes()))[name]
    tables = layout.tables(PRESETS[name])
    assert tables.keys() == recorded.keys()
    for component, entries in tables.items():
        assert {e.key: list(e.shape) for e in entries} == recorded[component]


def test_counts():
    counts = {
        name: sum(math.prod(e.shape) for e in layout.tables(config)["unet"])
        for name, config in PRESETS.items()
    }
    assert counts["SD15"] == 859_520_964
    assert counts["SD15_INPAINTING"] == 859_535_364
    assert counts["SD2"] == 865_910_724
    assert counts["SDXL_BASE"] == 2_567_463_684
    assert counts["SDXL_REFINER"] == 2_259_526_660
    assert counts["X4_UPSCALER"] == 473_398_020


@pytest.mark.parametrize("name", LANDMARKS)
def test_landmarks_of_original_files(name):
    assert set(LANDMARKS[name]) <= set(originals(PRESETS[name]))


@pytest.mark.parametrize("name", PRESETS)
def test_a_single_file_is_recognised_by_its_shapes(name, tmp_path):
    wanted = PRESETS[name]
    predicts = wanted.schedule.prediction_type
    step = 875_000 if name == "SD2_BASE" else None
    tensors = meta(originals(wanted), tmp_path)
    got = infer_config(tensors, "file", prediction_type=None, global_step=step)
    assert got.unet == wanted.unet
    assert got.vae == wanted.vae
    assert got.text_encoder == wanted.text_encoder
    assert got.text_encoder_2 == wanted.text_encoder_2
    assert got.schedule.prediction_type == predicts
    assert got == wanted
    told = infer_config(tensors, "file", prediction_type="sample", global_step=None)
    assert told.schedule.prediction_type == "sample"
