"""Configs of a diffusers folder, read as a ModelConfig.

Defaults are those of the classes that wrote the files, so old files that lack a key
mean what they meant then. A value that sdjax does not implement is an error.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax.config import (
    AutoencoderConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from sdjax.errors import SdjaxError
from sdjax.weights.json_file import Fields, parse_json, read_json
from sdjax.weights.limits import MAX_LAYERS, MAX_LEVELS, check_limits
from sdjax.weights.schedule_config import read_schedule

GENERATION_CONFIG = "generation_config.json"
"""Beside model_index.json: guidance scale and steps that suit the model."""

CORRECTING_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionDepth2ImgPipeline",
)
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "VQModel"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "CLIPTextModel"),
}

_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": ("text_time",),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": ("projection",),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (),
    "encoder_hid_dim_type": (),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (False,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (),
    "time_embedding_act_fn": (),
    "time_embedding_dim": (),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (),
}
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (),
    "latents_std": (),
    "lookup_from_codebook": (False,),
    "norm_type": ("group",),
    "shift_factor": (),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}


def read_folder_config(folder: Path) -> ModelConfig:
    """Reads model_index.json and every component's config.

    Raises:
        SdjaxError: naming file, key and value of what sdjax does not implement, or the
            class of a component that is no part of Stable Diffusion.
    """
    index_file = folder / "model_index.json"
    index = read_json(index_file)
    present = _components(index, index_file)
    unet_fields = _fields(folder, "unet")
    unet, vae = read_unet(unet_fields), read_vae(_vae_fields(folder, present["vae"]))
    is_xl = unet.vector == "add_embedding"
    towers = {
        name: read_text_encoder(
            _fields(folder, name),
            projected=present[name] == "CLIPTextModelWithProjection",
            is_xl=is_xl,
            pad=pad_token(folder, name.replace("text_encoder", "tokenizer")),
        )
        for name in ("text_encoder", "text_encoder_2")
        if name in present
    }
    latent = unet_fields.numbers("sample_size", 64, length=2)
    flags = Fields(index, index_file)
    config = ModelConfig(
        **_sampling_defaults(folder),
        unet=unet,
        vae=vae,
        text_encoder=towers.get("text_encoder"),
        text_encoder_2=towers.get("text_encoder_2"),
        schedule=_schedule(folder, index.get("_class_name")),
        sample_size=latent[0] * vae.downsample_factor,
        zero_empty_negative=is_xl and flags.flag("force_zeros_for_empty_prompt", True),
        aesthetic_score=is_xl and flags.flag("requires_aesthetics_score"),
    )
    check_limits(config, str(folder))
    return config


def _sampling_defaults(folder: Path) -> dict[str, Any]:
    """What generation_config.json says; sdjax's own use of a name of transformers'."""
    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return {}
    fields = Fields(read_json(file), file)
    given: dict[str, Any] = {}
    if "guidance_scale" in fields.data:
        given["guidance_scale"] = fields.number("guidance_scale", 7.5)
    if "num_inference_steps" in fields.data:
        given["num_inference_steps"] = fields.integer("num_inference_steps", 30)
    return given


def _schedule(folder: Path, pipeline: Any) -> ScheduleConfig:
    """The scheduler's config, as the pipeline of diffusers puts it right.

    Whatever the file says, those of SD 1 and 2 set steps_offset to 1 and clip_sample to
    false.
    """
    schedule = read_schedule(folder / "scheduler" / "scheduler_config.json")
    if pipeline in CORRECTING_PIPELINES:
        return dataclasses.replace(schedule, steps_offset=1, clip_sample=False)
    return schedule


def _components(index: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Component -> class; refuses pipelines of other kinds."""
    pipeline = index.get("_class_name")
    found: dict[str, str] = {}
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str):
            found[name] = value[1]
    for name, classes in CLASSES.items():
        if name in found and found[name] not in classes:
            raise SdjaxError(
                f"{file}: {name} is a {found[name]}; sdjax takes a {classes[0]}"
            )
    for name in ("unet", "vae"):
        if name not in found:
            raise SdjaxError(
                f"{file}: {pipeline!r:.80} has no {name}, so it is no Stable Diffusion"
            )
    if not {"text_encoder", "text_encoder_2"} & set(found):
        raise SdjaxError(f"{file}: {pipeline!r:.80} has no text_encoder")
    return found


def _fields(folder: Path, component: str) -> Fields:
    file = folder / component / "config.json"
    fields = Fields(read_json(file), file)
    name = fields.data.get("_class_name")
    if name is not None and name not in CLASSES[component]:
        raise fields.wrong("_class_name", CLASSES[component][0])
    return fields


def _vae_fields(folder: Path, kind: str) -> Fields:
    """The autoencoder's config, which must be of the class that the index names."""
    fields = _fields(folder, "vae")
    if fields.data.setdefault("_class_name", kind) != kind:
        raise fields.wrong("_class_name", f"what model_index.json says, {kind}")
    return fields


def read_unet(fields: Fields) -> UNetConfig:
    """UNet2DConditionModel's config."""
    fields.demand(_UNET_FIXED)
    channels = fields.numbers("block_out_channels", (320, 640, 1280, 1280))
    levels = len(channels)
    if not 1 <= levels <= MAX_LEVELS or 0 in channels:
        raise fields.wrong("block_out_channels", f"1 to {MAX_LEVELS} widths")
    attends = _attention_levels(fields, levels)
    depth = _depth(fields, levels)
    heads = "num_attention_heads"
    if fields.data.get(heads) is None:
        heads = "attention_head_dim"
    vector, vector_dim = _vector(fields)
    guidance = fields.data.get("time_cond_proj_dim")
    groups = fields.integer("norm_num_groups", 32)
    _demand_groups(fields, channels, groups)
    return UNetConfig(
        in_channels=fields.integer("in_channels", 4),
        out_channels=fields.integer("out_channels", 4),
        block_out_channels=channels,
        layers_per_block=_one(fields, "layers_per_block", 2, levels),
        transformer_depth=tuple(
            n if attend else 0 for n, attend in zip(depth, attends, strict=True)
        ),
        mid_transformer_depth=depth[-1],
        num_heads=_heads(fields, heads, channels),
        context_dim=_one(fields, "cross_attention_dim", 1280, levels),
        linear_projection=fields.flag("use_linear_projection"),
        cross_attention_only=tuple(
            map(bool, fields.numbers("only_cross_attention", False, length=levels))
        ),
        vector=vector,
        vector_dim=vector_dim,
        guidance_dim=fields.integer("time_cond_proj_dim") if guidance else None,
        norm_num_groups=groups,
    )


def _attention_levels(fields: Fields, levels: int) -> tuple[bool, ...]:
    """Which levels have attention, by the names of the blocks."""
    cross = ("CrossAttnDownBlock2D",) * 3
    down = fields.names("down_block_types", (*cross, "DownBlock2D"))
    up = fields.names("up_block_types", ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3))
    plain = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
    if len(down) != levels or not set(down) <= set(plain):
        raise fields.wrong("down_block_types", f"{levels} of {' or '.join(plain)}")
    attends = tuple(plain[name] for name in down)
    wanted = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1])
    if up != wanted:
        raise fields.wrong("up_block_types", f"the mirror of its down blocks, {wanted}")
    return attends


def _depth(fields: Fields, levels: int) -> tuple[int, ...]:
    depth = fields.numbers("transformer_layers_per_block", 1, length=levels)
    if not all(1 <= n <= MAX_LAYERS for n in depth):
        raise fields.wrong("transformer_layers_per_block", f"1 to {MAX_LAYERS}")
    return tuple(map(int, depth))


def _heads(fields: Fields, key: str, channels: tuple[int, ...]) -> tuple[int, ...]:
    """Heads per level: diffusers calls their number attention_head_dim."""
    heads = fields.numbers(key, 8, length=len(channels))
    if not all(n and width % n == 0 for n, width in zip(heads, channels, strict=True)):
        raise fields.wrong(key, f"numbers of heads that divide the widths {channels}")
    return tuple(map(int, heads))


def _one(fields: Fields, key: str, default: int, levels: int) -> int:
    """A number that must be the same on all levels."""
    values = set(fields.numbers(key, default, length=levels))
    if len(values) != 1 or not 1 <= max(values) <= 2**16:
        raise fields.wrong(key, "one positive integer for all levels")
    return int(values.pop())


def _vector(fields: Fields) -> tuple[Any, int | None]:
    """How a vector enters beside the time, and how wide it is."""
    width = "projection_class_embeddings_input_dim"
    labels = fields.data.get("num_class_embeds") is not None
    kinds = {
        "add_embedding": fields.data.get("addition_embed_type") is not None,
        "class_projection": fields.data.get("class_embed_type") is not None,
    }
    if sum(kinds.values()) > 1:
        raise fields.wrong("addition_embed_type", "no class embedding beside it")
    for kind, present in kinds.items():
        if present:
            return kind, fields.integer(width)
    if labels:
        return "class_embedding", fields.integer("num_class_embeds")
    return None, None


def _demand_groups(fields: Fields, channels: tuple[int, ...], groups: int) -> None:
    if any(width % groups for width in channels):
        raise fields.wrong("norm_num_groups", f"a divisor of the widths {channels}")


def read_vae(fields: Fields) -> AutoencoderConfig:
    """AutoencoderKL's or VQModel's config."""
    fields.demand(_VAE_FIXED)
    is_vq = fields.data.get("_class_name") == "VQModel"
    channels = fields.numbers("block_out_channels", (64,))
    levels = len(channels)
    if not 1 <= levels <= MAX_LEVELS or 0 in channels:
        raise fields.wrong("block_out_channels", f"1 to {MAX_LEVELS} widths")
    plain = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
    down = fields.names("down_block_types", ("DownEncoderBlock2D",))
    up = fields.names("up_block_types", ("UpDecoderBlock2D",))
    if len(down) != levels or not set(down) <= set(plain):
        raise fields.wrong("down_block_types", f"{levels} of {' or '.join(plain)}")
    attends = tuple(plain[name] for name in down)
    wanted = tuple(
        "AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in attends[::-1]
    )
    if up != wanted:
        raise fields.wrong("up_block_types", f"the mirror of its down blocks, {wanted}")
    groups = fields.integer("norm_num_groups", 32)
    _demand_groups(fields, channels, groups)
    latent = fields.integer("latent_channels", 3 if is_vq else 4)
    if is_vq and fields.integer("vq_embed_dim", latent) != latent:
        raise fields.wrong("vq_embed_dim", f"that of latent_channels, {latent}")
    return AutoencoderConfig(
        in_channels=fields.integer("in_channels", 3),
        out_channels=fields.integer("out_channels", 3),
        latent_channels=latent,
        block_out_channels=channels,
        layers_per_block=fields.integer("layers_per_block", 1, most=MAX_LAYERS),
        attention_levels=attends,
        mid_attention=fields.flag("mid_block_add_attention", True),
        codebook_size=fields.integer("num_vq_embeddings", 256) if is_vq else None,
        norm_num_groups=groups,
        scaling_factor=fields.number("scaling_factor", 0.18215),
    )


def read_text_encoder(
    fields: Fields, *, projected: bool, is_xl: bool, pad: int | None
) -> TextEncoderConfig:
    """CLIPTextConfig, or the text half of an old CLIPConfig."""
    inner = fields.data.get("text_config_dict") or fields.data.get("text_config")
    if "hidden_size" not in fields.data and isinstance(inner, dict):
        projection = fields.data.get("projection_dim")
        fields = Fields({"projection_dim": projection, **inner}, fields.file)
    activation = fields.choice("hidden_act", ("quick_gelu", "gelu"), "quick_gelu")
    width = fields.integer("hidden_size", 512)
    heads = fields.integer("num_attention_heads", 8, most=width)
    if width % heads:
        raise fields.wrong("num_attention_heads", f"a divisor of {width}")
    return TextEncoderConfig(
        vocab_size=fields.integer("vocab_size", 49408),
        width=width,
        num_layers=fields.integer("num_hidden_layers", 12, most=MAX_LAYERS),
        num_heads=heads,
        mlp_dim=fields.integer("intermediate_size", 2048),
        activation=activation,
        max_length=fields.integer("max_position_embeddings", 77),
        projection_dim=fields.integer("projection_dim", 512) if projected else None,
        layer_norm_eps=fields.number("layer_norm_eps", 1e-5),
        eos_token_id=fields.integer("eos_token_id", 49407),
        pad_token_id=default_pad(activation) if pad is None else pad,
        # SDXL was trained on the layer before the last, without the final norm.
        states="penultimate" if is_xl else "last",
        final_norm=not is_xl,
    )


def default_pad(activation: str) -> int:
    """OpenAI's CLIP pads with its end token, OpenCLIP with 0."""
    return 49407 if activation == "quick_gelu" else 0


def pad_token(folder: Path, tokenizer: str) -> int | None:
    """The id that a tokenizer's own files pad with; None where they do not say."""
    place = folder / tokenizer
    name: Any = None
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if name is None and (place / file).is_file():
            name = read_json(place / file).get("pad_token")
    if isinstance(name, dict):
        name = name.get("content")
    vocabulary: Any = None
    if (place / "vocab.json").is_file():
        vocabulary = read_json(place / "vocab.json")
    elif (place / "tokenizer.json").is_file():
        text = (place / "tokenizer.json").read_bytes()
        model = parse_json(text, str(place / "tokenizer.json")).get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(name, str) or not isinstance(vocabulary, dict):
        return None
    found = vocabulary.get(name)
    return found if type(found) is int else None
