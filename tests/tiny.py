"""Random models small enough for a test, one for each family, without torch."""

import functools
import zlib

import jax
import numpy as np

from sdjax.config import (
    AutoencoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from sdjax.model import Model
from sdjax.models import abstract_params
from sdjax.text.byte_vocabulary import byte_vocabulary

TEXT = TextEncoderConfig(
    vocab_size=514,
    width=32,
    num_layers=2,
    num_heads=2,
    mlp_dim=64,
    eos_token_id=513,
    pad_token_id=513,
)
TEXT_2 = TextEncoderConfig(
    vocab_size=514,
    width=32,
    num_layers=3,
    num_heads=2,
    mlp_dim=64,
    activation="gelu",
    projection_dim=16,
    eos_token_id=513,
    pad_token_id=0,
    states="penultimate",
    final_norm=False,
)
UNET = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    transformer_depth=(1, 0),
    num_heads=(2, 4),
    context_dim=32,
    cross_attention_only=(False, False),
)
VAE = AutoencoderConfig(
    block_out_channels=(32, 32, 32, 64),
    layers_per_block=1,
    attention_levels=(False,) * 4,
)

SD1 = ModelConfig(
    unet=UNET,
    vae=VAE,
    text_encoder=TEXT,
    schedule=ScheduleConfig(steps_offset=1),
    sample_size=64,
)
SD2 = ModelConfig(
    unet=UNetConfig(
        block_out_channels=(64, 64),
        layers_per_block=1,
        transformer_depth=(1, 0),
        num_heads=(1, 1),
        context_dim=32,
        linear_projection=True,
        cross_attention_only=(False, False),
    ),
    vae=VAE,
    text_encoder=TextEncoderConfig(
        vocab_size=514,
        width=32,
        num_layers=2,
        num_heads=2,
        mlp_dim=64,
        activation="gelu",
        eos_token_id=513,
        pad_token_id=0,
    ),
    schedule=ScheduleConfig(prediction_type="v_prediction", steps_offset=1),
    sample_size=64,
)
SDXL = ModelConfig(
    unet=UNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_depth=(0, 2),
        mid_transformer_depth=2,
        num_heads=(2, 4),
        context_dim=64,
        linear_projection=True,
        cross_attention_only=(False, False),
        vector="add_embedding",
        vector_dim=16 + 6 * 256,
    ),
    vae=VAE,
    text_encoder=TextEncoderConfig(
        vocab_size=514,
        width=32,
        num_layers=2,
        num_heads=2,
        mlp_dim=64,
        eos_token_id=513,
        pad_token_id=513,
        states="penultimate",
        final_norm=False,
    ),
    text_encoder_2=TEXT_2,
    schedule=ScheduleConfig(steps_offset=1),
    sample_size=64,
    zero_empty_negative=True,
)


@functools.cache
def tiny_model(config: ModelConfig = SD1) -> Model:
    files = byte_vocabulary()
    return Model(
        config,
        jax.tree.map(jax.numpy.asarray, numpy_params(config)),
        {"tokenizer": files, "tokenizer_2": files},
        "tiny",
    )


def numpy_params(config: ModelConfig):
    """Weights that numpy draws from each parameter's name: the same on any machine."""

    def draw(path, leaf):
        name = "/".join(key.key for key in path)
        normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal
        values = normal(leaf.shape).astype(np.float32)
        if name.endswith("kernel"):
            return values / np.sqrt(np.prod(leaf.shape[:-1]))
        return 1 + 0.1 * values if name.endswith("scale") else 0.1 * values

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def numpy_model(config: ModelConfig) -> Model:
    files = byte_vocabulary()
    tokenizers = {"tokenizer": files, "tokenizer_2": files}
    return Model(config, numpy_params(config), tokenizers, "numpy")
