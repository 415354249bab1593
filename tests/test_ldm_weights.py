"""Checkpoints of VQ, unconditional and class-conditional models, out and in again."""

import dataclasses
import json

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import SD1, TOKENIZERS, assert_same, draw
from safetensors.numpy import load_file

from sdjax import weights
from sdjax.config import ClassEmbedderConfig, ModelConfig, UNetConfig
from sdjax.errors import SdjaxError
from sdjax.models import abstract_params
from sdjax.models.attention import SpatialAttention
from sdjax.weights import layout
from sdjax.weights.limits import check_limits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")

VQ = dataclasses.replace(
    checkpoints.VAE, codebook_size=7, mid_attention=False, scaling_factor=1.0
)
TEXT = dataclasses.replace(SD1, vae=VQ)
PLAIN = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    transformer_depth=(0, 1),
    plain_attention=True,
    num_heads=(2, 4),
    cross_attention_only=(False, False),
)
UNCONDITIONAL = ModelConfig(unet=PLAIN, vae=VQ, text_encoder=None, sample_size=16)
CHURCHES = dataclasses.replace(
    UNCONDITIONAL,
    unet=dataclasses.replace(PLAIN, scale_shift_norm=True, resnet_resampling=True),
    vae=checkpoints.VAE,
)
CLASSES = dataclasses.replace(
    SD1,
    text_encoder=None,
    class_embedder=ClassEmbedderConfig(num_classes=11, width=64),
)
MODELS = {
    "text": TEXT,
    "unconditional": UNCONDITIONAL,
    "churches": CHURCHES,
    "classes": CLASSES,
}


def write(path, config, params, form):
    tokenizers = TOKENIZERS if config.text_encoders else {}
    weights.write(path, config, params, tokenizers, format=form)


@pytest.mark.parametrize("name", MODELS)
def test_leaves_are_those_of_the_networks(name):
    trees, tables = abstract_params(MODELS[name]), layout.tables(MODELS[name])
    assert trees.keys() == tables.keys()
    for component, entries in tables.items():
        found = {
            tuple(part.key for part in path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(trees[component])
        }
        assert found == {entry.path: entry.leaf_shape for entry in entries}


@pytest.mark.parametrize(
    "form", ["single-file", pytest.param("orbax", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name, form):
    config = MODELS[name]
    params = draw(config)
    write(tmp_path / "model", config, params, form)
    got = weights.read(tmp_path / "model")
    assert got.config == config
    assert_same(got.params, params)
    described = weights.describe(tmp_path / "model")
    assert described.parameters == {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for name, tree in params.items()
    }


def test_folder_of_a_vq_model(tmp_path):
    params = draw(TEXT)
    write(tmp_path / "model", TEXT, params, "diffusers")
    got = weights.read(tmp_path / "model")
    assert got.config.vae == VQ
    assert_same(got.params, params)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "VQModel"]


@pytest.mark.parametrize("name", ["unconditional", "classes"])
def test_what_a_folder_cannot_say(tmp_path, name):
    with pytest.raises(SdjaxError, match='"orbax" or "single-file"'):
        write(tmp_path / "model", MODELS[name], draw(MODELS[name]), "diffusers")
    assert not (tmp_path / "model").exists()


def test_original_names_and_shapes(tmp_path):
    write(tmp_path / "classes", CLASSES, draw(CLASSES), "single-file")
    tensors = load_file(tmp_path / "classes")
    assert tensors["cond_stage_model.embedding.weight"].shape == (11, 64)
    write(tmp_path / "plain", UNCONDITIONAL, draw(UNCONDITIONAL), "single-file")
    tensors = load_file(tmp_path / "plain")
    assert tensors["first_stage_model.quantize.embedding.weight"].shape == (7, 4)
    assert not any(".mid.attn_1." in key for key in tensors)
    site = "model.diffusion_model.middle_block.1."
    shapes = {k.removeprefix(site): v.shape for k, v in tensors.items() if site in k}
    assert shapes == {
        "norm.weight": (64,),
        "norm.bias": (64,),
        "qkv.weight": (192, 64, 1),
        "qkv.bias": (192,),
        "proj_out.weight": (64, 64, 1),
        "proj_out.bias": (64,),
    }


def test_packed_heads_attend_as_the_original_does(tmp_path):
    params = draw(UNCONDITIONAL)
    write(tmp_path / "plain", UNCONDITIONAL, params, "single-file")
    prefix = "model.diffusion_model.middle_block.1."
    got = {k: v.astype(np.float64) for k, v in load_file(tmp_path / "plain").items()}
    norm, qkv, out = (
        (got[f"{prefix}{n}.weight"], got[f"{prefix}{n}.bias"])
        for n in ("norm", "qkv", "proj_out")
    )
    x = np.random.default_rng(0).standard_normal((64, 6))  # channels, positions
    groups = x.reshape(32, -1)
    h = groups - groups.mean(1, keepdims=True)
    h = (h / np.sqrt(groups.var(1, keepdims=True) + 1e-5)).reshape(64, 6)
    h = norm[0][:, None] * h + norm[1][:, None]
    packed = qkv[0][..., 0] @ h + qkv[1][:, None]
    heads = []
    for head in np.split(packed, 4):  # heads first, then q, k and v: "legacy"
        q, k, v = np.split(head, 3)
        scores = np.exp(q.T @ k / np.sqrt(16))
        heads.append(v @ (scores / scores.sum(1, keepdims=True)).T)
    expected = x + out[0][..., 0] @ np.concatenate(heads) + out[1][:, None]
    tree = params["unet"]["mid_block"]["attentions_0"]
    ours = SpatialAttention(32, 1e-5, 4).apply(
        {"params": tree}, np.float32(x.T.reshape(1, 2, 3, 64))
    )
    ours = np.asarray(ours).reshape(6, 64).T
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(CLASSES, class_embedder=None), "has no text encoder"),
        (
            dataclasses.replace(CLASSES, class_embedder=ClassEmbedderConfig(width=3)),
            "class_embedder.width is 3; it must be the context's 64",
        ),
        (
            dataclasses.replace(
                UNCONDITIONAL, unet=dataclasses.replace(PLAIN, num_heads=(2, 3))
            ),
            "3 heads of the unet do not divide 64",
        ),
        (
            dataclasses.replace(
                UNCONDITIONAL, unet=dataclasses.replace(PLAIN, transformer_depth=(0, 2))
            ),
            "depth of the unet's transformers is 2, not 0 to 1",
        ),
    ],
)
def test_configs_that_are_refused(config, message):
    with pytest.raises(SdjaxError, match=message):
        check_limits(config, "file")
