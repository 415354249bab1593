"""The JSON files of a diffusers folder, from a ModelConfig."""

import dataclasses
import re
from typing import Any

from sdjax.config import (
    AutoencoderConfig,
    ModelConfig,
    TextEncoderConfig,
    UNetConfig,
)
from sdjax.errors import SdjaxError
from sdjax.weights.folder_config import GENERATION_CONFIG
from sdjax.weights.schedule_config import write_schedule

VERSION = "0.42.1"
"""The diffusers version whose keys these files have."""

_NONE = [None, None]


def folder_config(config: ModelConfig) -> ModelConfig:
    """The config a folder of this model has.

    A whole OpenCLIP-H tower, as in SD 2's single files, loses its last layer and its
    projection, which nothing reads, as in diffusers' own conversion.

    Raises:
        SdjaxError: if a diffusers folder cannot say what `config` says.
    """
    _check_expressible(config)
    tower = config.text_encoder
    is_xl = config.unet.vector == "add_embedding"
    if tower is not None and not is_xl and tower.states == "penultimate":
        tower = dataclasses.replace(
            tower, num_layers=tower.num_layers - 1, states="last", projection_dim=None
        )
        config = dataclasses.replace(config, text_encoder=tower)
    wanted = ("penultimate", False) if is_xl else ("last", True)
    for name, tower in config.text_encoders.items():
        if (tower.states, tower.final_norm) != wanted:
            raise SdjaxError(
                f"{name} is read at its {tower.states} layer with "
                f"final_norm={tower.final_norm}, which a diffusers folder cannot say"
            )
    return config


def _check_expressible(config: ModelConfig) -> None:
    """Refuses what is in none of the pipelines that read such a folder."""
    unet = config.unet
    kinds = {
        "a class embedder": config.class_embedder is not None,
        "plain attention in the U-Net": unet.plain_attention,
        "norms scaled by the time": unet.scale_shift_norm,
        "res blocks between the U-Net's levels": unet.resnet_resampling,
        "no text encoder": not config.text_encoders,
    }
    for kind, present in kinds.items():
        if present:
            raise SdjaxError(
                f"the model has {kind}, which a diffusers folder of sdjax cannot say: "
                'use the format "orbax" or "single-file"'
            )


def folder_files(config: ModelConfig, tokenizers: dict[str, Any]) -> dict[str, Any]:
    """File name -> JSON of every config in the folder."""
    is_xl = config.unet.vector == "add_embedding"
    default = "EulerDiscreteScheduler" if is_xl else "PNDMScheduler"
    schedule = write_schedule(config.schedule, default)
    files = {
        "unet/config.json": write_unet(config),
        "vae/config.json": write_vae(config.vae, config.sample_size),
        "scheduler/scheduler_config.json": schedule,
        "model_index.json": _index(config, schedule["_class_name"], tokenizers),
    }
    if sampling := _sampling_defaults(config):
        files[GENERATION_CONFIG] = sampling
    for name, tower in config.text_encoders.items():
        files[f"{name}/config.json"] = write_text_encoder(tower)
    if config.unet.vector == "class_embedding":
        # The x4-upscaler's noising of the small image has the same betas.
        low = {**schedule, "_class_name": "DDPMScheduler"}
        files["low_res_scheduler/scheduler_config.json"] = low
    return files


def _sampling_defaults(config: ModelConfig) -> dict[str, Any]:
    """What the model names for sampling, where that is not what every model gets."""
    usual = ModelConfig()
    names = ("guidance_scale", "num_inference_steps")
    given = {name: getattr(config, name) for name in names}
    return {n: value for n, value in given.items() if value != getattr(usual, n)}


def _index(
    config: ModelConfig, scheduler: str, tokenizers: dict[str, Any]
) -> dict[str, Any]:
    """model_index.json: the pipeline class and the class of every component."""
    pipeline, extra = _pipeline(config)
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": VERSION}
    for name in ("text_encoder", "text_encoder_2")[: 1 + (pipeline.find("XL") > 0)]:
        tower = config.text_encoders.get(name)
        index[name] = ["transformers", _text_class(tower)] if tower else _NONE
        tokenizer = name.replace("text_encoder", "tokenizer")
        present = tokenizer in tokenizers
        index[tokenizer] = ["transformers", "CLIPTokenizer"] if present else _NONE
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    index["vae"] = ["diffusers", _vae_class(config.vae)]
    index["scheduler"] = ["diffusers", scheduler]
    return index | extra


def _pipeline(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The pipeline class that runs this model, and its further entries."""
    unet = config.unet
    if unet.vector == "add_embedding":
        extra: dict[str, Any] = {
            "force_zeros_for_empty_prompt": config.zero_empty_negative,
            "feature_extractor": _NONE,
            "image_encoder": _NONE,
        }
        if config.aesthetic_score:
            scored = {"requires_aesthetics_score": True}
            return "StableDiffusionXLImg2ImgPipeline", extra | scored
        if unet.in_channels == 9:
            return "StableDiffusionXLInpaintPipeline", extra
        return "StableDiffusionXLPipeline", extra
    checker = {"safety_checker": _NONE, "feature_extractor": _NONE}
    if unet.vector == "class_embedding":
        low = {"low_res_scheduler": ["diffusers", "DDPMScheduler"]}
        return "StableDiffusionUpscalePipeline", {"watermarker": _NONE} | checker | low
    if unet.vector == "class_projection":
        names = ("image_encoder", "image_normalizer", "image_noising_scheduler")
        return "StableUnCLIPImg2ImgPipeline", dict.fromkeys(
            (*names, "feature_extractor"), _NONE
        )
    if unet.in_channels == 5:
        extra = {"depth_estimator": _NONE, "feature_extractor": _NONE}
        return "StableDiffusionDepth2ImgPipeline", extra
    if unet.guidance_dim:
        return "LatentConsistencyModelPipeline", checker | {"image_encoder": _NONE}
    names = {
        8: "StableDiffusionInstructPix2PixPipeline",
        9: "StableDiffusionInpaintPipeline",
    }
    extra = checker | {"image_encoder": _NONE, "requires_safety_checker": False}
    return names.get(unet.in_channels, "StableDiffusionPipeline"), extra


def write_unet(config: ModelConfig) -> dict[str, Any]:
    """UNet2DConditionModel's config.json."""
    unet: UNetConfig = config.unet
    attends = [bool(depth) for depth in unet.transformer_depth]
    depth = list(unet.transformer_depth)
    # Levels without attention have a depth in diffusers, which the middle block uses.
    filled = [n or unet.mid_transformer_depth for n in depth]
    if filled[-1] != unet.mid_transformer_depth:
        raise SdjaxError(
            f"the middle block has {unet.mid_transformer_depth} transformer blocks and "
            f"the last level {filled[-1]}, which a diffusers folder cannot say"
        )
    vector: dict[str, Any] = {}
    if unet.vector == "class_embedding":
        vector = {"num_class_embeds": unet.vector_dim}
    elif unet.vector is not None:
        vector = {"projection_class_embeddings_input_dim": unet.vector_dim}
    if unet.vector == "class_projection":
        vector["class_embed_type"] = "projection"
    if unet.vector == "add_embedding":
        vector |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": _size_embedding(config),
        }
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "attention_head_dim": list(unet.num_heads),
        "block_out_channels": list(unet.block_out_channels),
        "cross_attention_dim": unet.context_dim,
        "down_block_types": down,
        "in_channels": unet.in_channels,
        "layers_per_block": unet.layers_per_block,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": unet.norm_num_groups,
        "only_cross_attention": list(unet.cross_attention_only),
        "out_channels": unet.out_channels,
        "sample_size": config.sample_size // config.vae.downsample_factor,
        "time_cond_proj_dim": unet.guidance_dim,
        "transformer_layers_per_block": filled,
        "up_block_types": up,
        "use_linear_projection": unet.linear_projection,
        **vector,
    }


def _size_embedding(config: ModelConfig) -> int:
    """Width of one size's sinusoid: the vector is pooled text and 5 or 6 of them."""
    tower = config.text_encoder_2
    if config.unet.vector_dim is None or tower is None or tower.projection_dim is None:
        raise SdjaxError("an SDXL model needs text_encoder_2 with a projection")
    sizes = 5 if config.aesthetic_score else 6
    return (config.unet.vector_dim - tower.projection_dim) // sizes


def write_vae(vae: AutoencoderConfig, sample_size: int) -> dict[str, Any]:
    """AutoencoderKL's or VQModel's config.json."""
    attends = vae.attention_levels
    codebook: dict[str, Any] = {}
    if vae.codebook_size is not None:
        codebook = {
            "num_vq_embeddings": vae.codebook_size,
            "vq_embed_dim": vae.latent_channels,
        }
    return {
        "_class_name": _vae_class(vae),
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": list(vae.block_out_channels),
        "down_block_types": [
            "AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends
        ],
        "in_channels": vae.in_channels,
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.layers_per_block,
        "mid_block_add_attention": vae.mid_attention,
        "norm_num_groups": vae.norm_num_groups,
        "out_channels": vae.out_channels,
        "sample_size": sample_size,
        "scaling_factor": vae.scaling_factor,
        "up_block_types": [
            "AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in attends[::-1]
        ],
        **codebook,
    }


def _vae_class(vae: AutoencoderConfig) -> str:
    return "AutoencoderKL" if vae.codebook_size is None else "VQModel"


def write_text_encoder(tower: TextEncoderConfig) -> dict[str, Any]:
    """CLIPTextConfig's config.json."""
    old = tower.eos_token_id == 2
    return {
        "architectures": [_text_class(tower)],
        "attention_dropout": 0.0,
        "bos_token_id": 0 if old else 49406,
        "eos_token_id": tower.eos_token_id,
        "hidden_act": tower.activation,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_dim,
        "layer_norm_eps": tower.layer_norm_eps,
        "max_position_embeddings": tower.max_length,
        "model_type": "clip_text_model",
        "num_attention_heads": tower.num_heads,
        "num_hidden_layers": tower.num_layers,
        "pad_token_id": 1 if old else tower.pad_token_id,
        "projection_dim": tower.projection_dim or tower.width,
        "vocab_size": tower.vocab_size,
    }


def _text_class(tower: TextEncoderConfig) -> str:
    projected = tower.projection_dim is not None
    return "CLIPTextModelWithProjection" if projected else "CLIPTextModel"


def shard_name(stem: str, number: int, count: int) -> str:
    """The name of shard `number`, from 1, of `count`."""
    if count == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{number:05}-of-{count:05}.safetensors"


def weights_stem(component: str) -> str:
    """The name of a component's weights file, without extension."""
    is_text = re.match("text_encoder", component)
    return "model" if is_text else "diffusion_pytorch_model"
