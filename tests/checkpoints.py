"""Small random checkpoints for the tests of `sdjax.weights`, without torch.

Trees are drawn from the name tables, which `test_weights_names.py` holds against the
networks and against torch.
"""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from sdjax.config import (
    AutoencoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from sdjax.weights import layout
from sdjax.weights.entries import from_leaf

CLIP = TextEncoderConfig(vocab_size=99, width=64, num_layers=2, num_heads=1, mlp_dim=32)
OPEN_CLIP = dataclasses.replace(CLIP, activation="gelu", pad_token_id=0)
UNET = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    transformer_depth=(1, 0),
    num_heads=(8, 8),
    context_dim=64,
    cross_attention_only=(False, False),
)
VAE = AutoencoderConfig(
    block_out_channels=(32, 64), layers_per_block=1, attention_levels=(False, False)
)
SD_SCHEDULE = ScheduleConfig(sampler="plms", steps_offset=1, set_alpha_to_one=False)
SD1 = ModelConfig(
    unet=UNET, vae=VAE, text_encoder=CLIP, schedule=SD_SCHEDULE, sample_size=16
)
SD2 = dataclasses.replace(
    SD1,
    unet=dataclasses.replace(UNET, linear_projection=True, num_heads=(1, 1)),
    text_encoder=OPEN_CLIP,
    schedule=dataclasses.replace(
        SD_SCHEDULE, sampler="ddim", prediction_type="v_prediction"
    ),
)
SD2_WHOLE = dataclasses.replace(
    SD2,
    text_encoder=dataclasses.replace(
        OPEN_CLIP, num_layers=3, projection_dim=48, states="penultimate"
    ),
)
SDXL = ModelConfig(
    unet=UNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_depth=(0, 2),
        mid_transformer_depth=2,
        num_heads=(1, 1),
        context_dim=128,
        linear_projection=True,
        cross_attention_only=(False, False),
        vector="add_embedding",
        vector_dim=48 + 6 * 8,
    ),
    vae=dataclasses.replace(VAE, scaling_factor=0.13025),
    text_encoder=dataclasses.replace(CLIP, states="penultimate", final_norm=False),
    text_encoder_2=dataclasses.replace(
        OPEN_CLIP, projection_dim=48, states="penultimate", final_norm=False
    ),
    schedule=ScheduleConfig(
        sampler="euler", timestep_spacing="leading", steps_offset=1
    ),
    sample_size=16,
    zero_empty_negative=True,
)
REFINER = dataclasses.replace(
    SDXL,
    unet=dataclasses.replace(SDXL.unet, context_dim=64, vector_dim=48 + 5 * 8),
    text_encoder=None,
    zero_empty_negative=False,
    aesthetic_score=True,
)
X4 = dataclasses.replace(
    SD2,
    unet=dataclasses.replace(
        SD2.unet,
        in_channels=7,
        num_heads=(8, 8),
        transformer_depth=(0, 1),
        context_dim=96,
        cross_attention_only=(True, True),
        vector="class_embedding",
        vector_dim=10,
    ),
    text_encoder=dataclasses.replace(OPEN_CLIP, width=96),
)
F16 = dataclasses.replace(
    SD1, vae=dataclasses.replace(VAE, attention_levels=(False, True))
)
LCM = dataclasses.replace(
    SD1,
    unet=dataclasses.replace(UNET, guidance_dim=16),
    schedule=ScheduleConfig(sampler="lcm"),
)
UNCLIP = dataclasses.replace(
    SD2, unet=dataclasses.replace(SD2.unet, vector="class_projection", vector_dim=12)
)
ALL = {
    "sd1": SD1,
    "sd2": SD2,
    "sd2_whole": SD2_WHOLE,
    "sdxl": SDXL,
    "refiner": REFINER,
    "x4": X4,
    "f16": F16,
    "lcm": LCM,
    "unclip": UNCLIP,
}
TOKENIZERS = {
    "tokenizer": {
        "vocab.json": b'{"!": 0, "<|endoftext|>": 49407}',
        "merges.txt": b"#version: 0.2\n",
        "tokenizer_config.json": b'{"pad_token": "<|endoftext|>"}',
    }
}


def draw(config, dtype=np.float32, seed=0):
    """A random tree for `config`."""
    rng = np.random.default_rng(seed)
    params = {}
    for component, entries in layout.tables(config).items():
        tree = params[component] = {}
        for entry in entries:
            *parents, leaf = entry.path
            node = tree
            for name in parents:
                node = node.setdefault(name, {})
            array = rng.standard_normal(entry.leaf_shape, np.float32)
            node[leaf] = jnp.asarray(array.astype(dtype))
    return params


def flat(params, path=()):
    """Path -> numpy array."""
    if not isinstance(params, dict):
        return {path: np.asarray(params)}
    result = {}
    for name, value in params.items():
        result |= flat(value, (*path, name))
    return result


def assert_same(got, wanted):
    """Demands the same leaves, to the byte."""
    got, wanted = flat(got), flat(wanted)
    assert got.keys() == wanted.keys()
    for path, array in wanted.items():
        assert got[path].dtype == array.dtype, path
        assert got[path].tobytes() == array.tobytes(), path


def original_tensors(config, params):
    """Key -> array of a single file, written down anew: no code of `write`."""
    leaves = flat(params)
    result, packed = {}, {}
    for component, entries in layout.tables(config).items():
        prefix = layout.original_prefix(config, component)
        for entry in entries:
            array = from_leaf(entry, leaves[(component, *entry.path)])
            key = prefix + entry.original
            if entry.form == "packed":
                packed.setdefault(key, []).append(array)
            elif entry.form == "transposed":
                result[key] = np.ascontiguousarray(array.T)
            else:
                result[key] = array.reshape(entry.original_shape)
    return result | {key: np.concatenate(parts) for key, parts in packed.items()}


def save_original(file, config, params, extra=()):
    """Writes a single file as others write them: without our metadata."""
    save_file({**original_tensors(config, params), **dict(extra)}, file)


DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
