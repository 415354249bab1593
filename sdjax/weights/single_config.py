"""What an original-layout file says about its model: the shapes of its tensors.

Shapes give every width and depth. What they do not give follows the published models:
heads (8 in SD 1 and the x4-upscaler, else 64 channels each), scaling factor, schedule
and, for SD 2, the prediction type, which the caller may say.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.config import (
    AutoencoderConfig,
    ModelConfig,
    PredictionType,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from sdjax.errors import SdjaxError
from sdjax.weights.folder_config import default_pad
from sdjax.weights.limits import MAX_LAYERS, check_limits
from sdjax.weights.tensors import Tensor
from sdjax.weights.unet_names import ORIGINAL_PREFIX as UNET
from sdjax.weights.vae_names import ORIGINAL_PREFIX as VAE

EPSILON_STEP = 875_000
"""global_step of the SD 2 base checkpoint, which predicts ε (diffusers' rule)."""

_CLIP = "text_model.embeddings.token_embedding.weight"
_OPEN_CLIP = "token_embedding.weight"
_XL_TOWERS = "conditioner.embedders."


class Shapes:
    """Shapes by key, with errors that name the file."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str):
        self.tensors = tensors
        self.where = where

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def get(self, key: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there, with at least `rank` axes.

        Raises:
            SdjaxError: if the tensor is missing, empty or of lower rank.
        """
        if key not in self.tensors:
            raise SdjaxError(f"{self.where} lacks {key}: no whole Stable Diffusion")
        shape = self.tensors[key].shape
        if len(shape) < rank or 0 in shape:
            raise SdjaxError(f"{self.where}: {key} has the shape {shape}")
        return shape

    def count(self, pattern: str) -> int:
        """How many of `pattern`, with {} for 0, 1, 2, ..., are there."""
        number = 0
        while number < MAX_LAYERS and pattern.format(number) in self.tensors:
            number += 1
        return number


def infer_config(
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    prediction_type: PredictionType | None,
    global_step: int | None,
) -> ModelConfig:
    """The config of an original-layout file, from its tensors.

    Args:
        tensors: by their commonest spelling (`layout.original_key`).
        where: the file, for errors.
        prediction_type: what the user says; None: as published.
        global_step: from the file, if it says.

    Raises:
        SdjaxError: if the tensors are not those of a Stable Diffusion model.
    """
    shapes = Shapes(tensors, where)
    if f"{UNET}input_blocks.0.0.weight" not in shapes:
        raise SdjaxError(_not_a_model(tensors, where))
    unet = infer_unet(shapes)
    vae = infer_vae(shapes)
    first, second = _towers(shapes)
    schedule, size = _schedule(unet, global_step)
    if prediction_type is not None:
        schedule = dataclasses.replace(schedule, prediction_type=prediction_type)
    is_refiner = first is None
    config = ModelConfig(
        unet=unet,
        vae=dataclasses.replace(vae, scaling_factor=_scaling(shapes, unet)),
        text_encoder=first,
        text_encoder_2=second,
        schedule=schedule,
        sample_size=size,
        zero_empty_negative=second is not None and not is_refiner,
        aesthetic_score=is_refiner,
    )
    check_limits(config, where)
    return config


def infer_unet(shapes: Shapes) -> UNetConfig:
    """The U-Net's config, walking its input blocks."""
    out, in_channels = shapes.get(f"{UNET}input_blocks.0.0.weight", 4)[:2]
    channels, depths, only, layers, block = [out], [0], [False], [0], 1
    transformer = None
    while block < MAX_LAYERS:
        site = f"{UNET}input_blocks.{block}."
        if f"{site}0.op.weight" in shapes:
            channels, depths = [*channels, channels[-1]], [*depths, 0]
            only, layers = [*only, False], [*layers, 0]
        elif f"{site}0.in_layers.2.weight" in shapes:
            channels[-1] = shapes.get(f"{site}0.in_layers.2.weight", 4)[0]
            layers[-1] += 1
            if f"{site}1.norm.weight" in shapes:
                transformer = f"{site}1."
                depths[-1] = shapes.count(_blocks(transformer))
                only[-1] = _is_cross_only(shapes, transformer)
        else:
            break
        block += 1
    middle = f"{UNET}middle_block.1."
    mid_depth = shapes.count(_blocks(middle))
    transformer = transformer or middle
    # A level without attention says nothing; it goes with the level below it.
    for level in range(len(only) - 2, -1, -1):
        only[level] = only[level] if depths[level] else only[level + 1]
    projection = len(shapes.get(f"{transformer}proj_in.weight", 2)) == 2
    attention = f"{transformer}transformer_blocks.0.attn2.to_k.weight"
    vector, vector_dim = _vector(shapes)
    guidance = f"{UNET}time_embed.cond_proj.weight"
    fixed_heads = not projection or vector == "class_embedding"
    return UNetConfig(
        in_channels=in_channels,
        out_channels=shapes.get(f"{UNET}out.2.weight", 4)[0],
        block_out_channels=tuple(channels),
        layers_per_block=layers[0],
        transformer_depth=tuple(depths),
        mid_transformer_depth=mid_depth,
        num_heads=tuple(8 if fixed_heads else max(1, c // 64) for c in channels),
        context_dim=shapes.get(attention, 2)[1],
        linear_projection=projection,
        cross_attention_only=tuple(only),
        vector=vector,
        vector_dim=vector_dim,
        guidance_dim=shapes.get(guidance, 2)[1] if guidance in shapes else None,
    )


def _blocks(transformer: str) -> str:
    return transformer + "transformer_blocks.{}.norm1.weight"


def _is_cross_only(shapes: Shapes, transformer: str) -> bool:
    """Whether attn1 reads the context: its keys are then as wide as attn2's."""
    block = f"{transformer}transformer_blocks.0."
    own, in_ = shapes.get(f"{block}attn1.to_k.weight", 2)[:2]
    return in_ != own and in_ == shapes.get(f"{block}attn2.to_k.weight", 2)[1]


def _vector(shapes: Shapes) -> tuple[Any, int | None]:
    labels, mlp = f"{UNET}label_emb.weight", f"{UNET}label_emb.0.0.weight"
    if labels in shapes:
        return "class_embedding", shapes.get(labels, 2)[0]
    if mlp in shapes:
        is_xl = any(key.startswith(_XL_TOWERS) for key in shapes.tensors)
        name = "add_embedding" if is_xl else "class_projection"
        return name, shapes.get(mlp, 2)[1]
    return None, None


def infer_vae(shapes: Shapes) -> AutoencoderConfig:
    """The autoencoder's config, from its encoder."""
    if f"{VAE}quantize.embedding.weight" in shapes:
        raise SdjaxError(
            f"{shapes.where} holds a VQ autoencoder, and nothing in it tells the "
            "model's heads and schedule: sdjax takes such a file only from itself"
        )
    levels = shapes.count(f"{VAE}encoder.down.{{}}.block.0.conv1.weight")
    block = VAE + "encoder.down.{}.block.0.conv1.weight"
    channels = tuple(shapes.get(block.format(i), 4)[0] for i in range(levels))
    attention = VAE + "encoder.down.{}.attn.0.norm.weight"
    if not channels:
        raise SdjaxError(f"{shapes.where} has no autoencoder under {VAE}*")
    return AutoencoderConfig(
        in_channels=shapes.get(f"{VAE}encoder.conv_in.weight", 4)[1],
        out_channels=shapes.get(f"{VAE}decoder.conv_out.weight", 4)[0],
        latent_channels=shapes.get(f"{VAE}decoder.conv_in.weight", 4)[1],
        block_out_channels=channels,
        layers_per_block=shapes.count(f"{VAE}encoder.down.0.block.{{}}.conv1.weight"),
        attention_levels=tuple(attention.format(i) in shapes for i in range(levels)),
    )


def _towers(
    shapes: Shapes,
) -> tuple[TextEncoderConfig | None, TextEncoderConfig | None]:
    """The first and the second text tower."""
    if f"{_XL_TOWERS}1.model.{_OPEN_CLIP}" in shapes:
        first = _clip(shapes, f"{_XL_TOWERS}0.transformer.")
        return _as_xl(first), _as_xl(_open_clip(shapes, f"{_XL_TOWERS}1.model."))
    if f"{_XL_TOWERS}0.model.{_OPEN_CLIP}" in shapes:
        return None, _as_xl(_open_clip(shapes, f"{_XL_TOWERS}0.model."))
    if f"cond_stage_model.model.{_OPEN_CLIP}" in shapes:
        tower = _open_clip(shapes, "cond_stage_model.model.")
        # Whole towers are read before their last layer; repackaged ones lack it.
        whole = tower.projection_dim is not None or tower.num_layers == 24
        states = "penultimate" if whole else "last"
        return dataclasses.replace(tower, states=states), None
    return _clip(shapes, "cond_stage_model.transformer."), None


def _as_xl(tower: TextEncoderConfig) -> TextEncoderConfig:
    return dataclasses.replace(tower, states="penultimate", final_norm=False)


def _clip(shapes: Shapes, prefix: str) -> TextEncoderConfig:
    layer = prefix + "text_model.encoder.layers.{}."
    projection = f"{prefix}text_projection.weight"
    position = f"{prefix}text_model.embeddings.position_embedding.weight"
    return _tower(
        embedding=shapes.get(prefix + _CLIP, 2),
        position=shapes.get(position, 2),
        layers=shapes.count(layer + "layer_norm1.weight"),
        mlp=shapes.get(layer.format(0) + "mlp.fc1.weight", 2),
        projection=shapes.get(projection, 2)[0] if projection in shapes else None,
        activation="quick_gelu",
    )


def _open_clip(shapes: Shapes, prefix: str) -> TextEncoderConfig:
    layer = prefix + "transformer.resblocks.{}."
    projection = f"{prefix}text_projection"
    return _tower(
        embedding=shapes.get(prefix + _OPEN_CLIP, 2),
        position=shapes.get(f"{prefix}positional_embedding", 2),
        layers=shapes.count(layer + "ln_1.weight"),
        mlp=shapes.get(layer.format(0) + "mlp.c_fc.weight", 2),
        projection=shapes.get(projection, 2)[1] if projection in shapes else None,
        activation="gelu",
    )


def _tower(
    *,
    embedding: tuple[int, ...],
    position: tuple[int, ...],
    layers: int,
    mlp: tuple[int, ...],
    projection: int | None,
    activation: Any,
) -> TextEncoderConfig:
    vocabulary, width = embedding[:2]
    return TextEncoderConfig(
        vocab_size=vocabulary,
        width=width,
        num_layers=layers,
        num_heads=max(1, width // 64),
        mlp_dim=mlp[0],
        activation=activation,
        max_length=position[0],
        projection_dim=projection,
        pad_token_id=default_pad(activation),
    )


def _schedule(unet: UNetConfig, global_step: int | None) -> tuple[ScheduleConfig, int]:
    """The published schedule of this kind of model, and its native size in pixels."""
    base = ScheduleConfig(sampler="plms", steps_offset=1, set_alpha_to_one=False)
    if unet.vector == "add_embedding":
        euler = ScheduleConfig(
            sampler="euler", timestep_spacing="leading", steps_offset=1
        )
        schedule, size = euler, 1024
    elif not unet.linear_projection:
        schedule, size = base, 512
    elif unet.vector == "class_embedding":
        schedule = dataclasses.replace(base, beta_start=0.0001, beta_end=0.02)
        schedule, size = _as_v(schedule), 512
    elif unet.in_channels in (5, 9) or global_step == EPSILON_STEP:
        schedule, size = base, 512
    else:
        schedule, size = _as_v(base), 768
    if unet.guidance_dim:
        schedule = ScheduleConfig(sampler="lcm")
    return schedule, size


def _as_v(schedule: ScheduleConfig) -> ScheduleConfig:
    return dataclasses.replace(schedule, sampler="ddim", prediction_type="v_prediction")


def _scaling(shapes: Shapes, unet: UNetConfig) -> float:
    """The latent's scale: the file's own, where it is exact, else as published."""
    own = shapes.tensors.get("scale_factor")
    if own is not None and own.size == 1 and own.dtype.itemsize >= 4:
        value = own.read().reshape(())
        if np.isfinite(value) and value > 0:
            # Shortest decimal: 0.18215, not the float32 next to it in float64.
            return float(str(value))
    published = {"add_embedding": 0.13025, "class_embedding": 0.08333}
    return published.get(unet.vector or "", 0.18215)


def _not_a_model(tensors: Mapping[str, Tensor], where: str) -> str:
    """What a file without a U-Net seems to be."""
    guesses = {
        r".*lora.*": "a LoRA",
        r"(down_blocks|up_blocks|conv_in)\..*": "a part of a diffusers folder",
        r"(first_stage_model|encoder|decoder)\..*": "an autoencoder alone",
        r"(text_model|embeddings|cond_stage_model)\..*": "a text encoder alone",
    }
    for pattern, guess in guesses.items():
        if any(re.fullmatch(pattern, key) for key in tensors):
            return f"{where} holds {guess}, not a whole model: it has no {UNET}*"
    return f"{where} has no {UNET}* tensors, so it is no Stable Diffusion checkpoint"
