"""Frozen dataclasses that describe a model: shapes and numbers, no logic.

Field names follow the papers and, where those are silent, diffusers. Defaults are
Stable Diffusion 1.5.
"""

import dataclasses
import typing
from typing import Any, Literal

from sdjax.errors import SdjaxError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]
TextStates = Literal["last", "penultimate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The U-Net of latent diffusion (Rombach et al. 2022) with its SD variants.

    Per-level tuples start at the highest resolution.

    Attributes:
        in_channels: latent channels plus those of `Conditioning.concat`.
        transformer_depth: transformer blocks per attention, per level; 0: none.
        mid_transformer_depth: the same in the middle block.
        plain_attention: attention is one self-attention without context, in place of
            the transformers, wherever their depth is not 0 (unconditional LDMs).
        num_heads: attention heads per level; the middle block takes the last.
        context_dim: width of `Conditioning.context`.
        linear_projection: proj_in and proj_out are Linear (SD 2, SDXL), not 1×1 conv.
        cross_attention_only: per level, self-attention attends to the context
            (x4-upscaler).
        vector: how `Conditioning.vector` enters: "class_embedding" is an embedding
            of integer labels, "class_projection" and "add_embedding" are MLPs that
            differ in name only.
        vector_dim: number of labels, or width of the vector.
        guidance_dim: width of `Conditioning.guidance` (LCM), 256 where present.
        scale_shift_norm: the time scales and shifts the second norm of a res block,
            instead of being added before it.
        resnet_resampling: between levels, res blocks that average or repeat pixels
            take the place of the convolutions.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    mid_transformer_depth: int = 1
    plain_attention: bool = False
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    linear_projection: bool = False
    cross_attention_only: tuple[bool, ...] = (False, False, False, False)
    vector: Literal["class_embedding", "class_projection", "add_embedding"] | None = (
        None
    )
    vector_dim: int | None = None
    guidance_dim: int | None = None
    norm_num_groups: int = 32
    scale_shift_norm: bool = False
    resnet_resampling: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The autoencoder, KL-regularised or VQ (f = 2 to the power of levels - 1).

    Attributes:
        block_out_channels: per level, highest resolution first.
        attention_levels: per level, whether an attention follows each of its res
            blocks (kl-f16, kl-f32, vq-f8).
        mid_attention: whether the middle block has one (all but vq-f4-noattn).
        codebook_size: number of codes that the decoder snaps latents to; None: a KL
            autoencoder, which has none.
        scaling_factor: latents = posterior sample × scaling_factor.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    attention_levels: tuple[bool, ...] = (False, False, False, False)
    mid_attention: bool = True
    codebook_size: int | None = None
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent along one side (f in the paper)."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """A CLIP or OpenCLIP text tower.

    Attributes:
        projection_dim: width of the joint space; None: no projection, no pooled
            projection output.
        eos_token_id: pooled output is taken at its first occurrence; 2, in old files,
            means the position of the largest id.
        pad_token_id: fills a prompt up to `max_length`.
        states: which layer the U-Net reads: the last, or the one before it.
        final_norm: whether those states pass through the final LayerNorm.
    """

    vocab_size: int = 49408
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    max_length: int = 77
    projection_dim: int | None = None
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    pad_token_id: int = 49407
    states: TextStates = "last"
    final_norm: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassEmbedderConfig:
    """A table of one context token per class.

    Attributes:
        num_classes: rows; where the last is no class of the data, it is the
            unconditional one (cin256-v2).
        width: that of `Conditioning.context`.
    """

    num_classes: int = 1000
    width: int = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The noise schedule a model was trained with, and its sampling defaults.

    Attributes:
        beta_schedule: diffusers' names: "scaled_linear" is √-linear (CompVis calls
            it "linear"), "linear" is linear in β.
        rescale_betas_zero_snr: zero terminal SNR (Lin et al. 2023, arXiv:2305.08891).
        sampler: the sampler a folder names; None: generate's default.
        timestep_spacing, steps_offset, set_alpha_to_one: None: the sampler's default.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: PredictionType = "epsilon"
    rescale_betas_zero_snr: bool = False
    sampler: str | None = None
    timestep_spacing: TimestepSpacing | None = None
    steps_offset: int | None = None
    set_alpha_to_one: bool | None = None
    clip_sample: bool = False
    clip_sample_range: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model. Component names are those of diffusers folders.

    Attributes:
        text_encoder: CLIP-L of SD 1 and SDXL, OpenCLIP-H of SD 2; None in the refiner.
        text_encoder_2: OpenCLIP-bigG of SDXL and its refiner.
        class_embedder: gives a class-conditional model its context.
        sample_size: native image side in pixels.
        zero_empty_negative: without a negative prompt, the unconditional states are
            zeros instead of the encoded empty string (SDXL base).
        aesthetic_score: the size vector ends with an aesthetic score (refiner).
        guidance_scale: what suits the model, where none is asked for.
        num_inference_steps: likewise.
    """

    unet: UNetConfig = UNetConfig()
    vae: AutoencoderConfig = AutoencoderConfig()
    text_encoder: TextEncoderConfig | None = TextEncoderConfig()
    text_encoder_2: TextEncoderConfig | None = None
    class_embedder: ClassEmbedderConfig | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    sample_size: int = 512
    zero_empty_negative: bool = False
    aesthetic_score: bool = False
    guidance_scale: float = 7.5
    num_inference_steps: int = 30

    @property
    def text_encoders(self) -> dict[str, TextEncoderConfig]:
        """The text towers that are there, by component name, in order."""
        towers = {
            "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2,
        }
        return {name: tower for name, tower in towers.items() if tower is not None}


def to_json(config: Any) -> Any:
    """Turns a config into plain dicts, lists, numbers and strings."""
    return dataclasses.asdict(config)


def from_json(data: Any, cls: Any = ModelConfig) -> Any:
    """Builds the config `cls` from what `to_json` gave.

    Raises:
        SdjaxError: if `data` has a key that `cls` lacks, or is no JSON object.
    """
    if not isinstance(data, dict):
        raise SdjaxError(f"{cls.__name__} must be a JSON object, not {data!r:.80}")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise SdjaxError(f"{cls.__name__} has no field {unknown[0]!r}")
    return cls(**{name: _restore(value, fields[name]) for name, value in data.items()})


def _restore(value: Any, annotation: Any) -> Any:
    """Undoes what JSON does to one field: nested configs and tuples."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        options = [annotation, *typing.get_args(annotation)]
        return from_json(value, next(o for o in options if dataclasses.is_dataclass(o)))
    return value
