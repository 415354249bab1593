"""What a training run is: frozen dataclasses, one for each part of the recipe.

A file in `configs/` builds a `TrainConfig`; the command line replaces single fields
of it (`--set optimizer.learning_rate=1e-4`).
"""

import dataclasses
from typing import Literal

from sdjax.config import ModelConfig

Task = Literal["diffusion", "autoencoder"]
Loss = Literal["l2", "l1", "huber"]
LearningRateSchedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pictures, and how they become batches.

    Attributes:
        path: a folder of pictures with captions, of tar shards, or of a TFDS
            ArrayRecord dataset; `sdjax.data.open_source` tells which.
        batch_size: pictures per step, over all devices and hosts.
        resolution: side in pixels of the square that pictures are brought to; with
            buckets, the area is its square. None: the model's `sample_size`.
        bucket_step: sides are multiples of it, and pictures keep about their own
            aspect ratio; None: every picture becomes a square.
        crop: which part remains of a picture that is not of the wanted shape.
        shift: pixels by which a picture is moved at random, white moving in.
        flip: probability of mirroring left and right.
        caption_dropout: probability that a caption is replaced by the empty one.
        caption_templates: one is drawn for each caption, which takes the place of {}.
        num_workers: processes that read and decode; 0: the training process itself.
        max_bad_share: share of pictures that may be unreadable before the run stops.
        cache: folder of autoencoder moments and text states that `sdjax cache` wrote,
            read in place of `path`.
    """

    path: str = ""
    batch_size: int = 16
    resolution: int | None = 512
    bucket_step: int | None = None
    crop: Literal["center", "random"] = "center"
    shift: int = 0
    flip: float = 0.0
    caption_dropout: float = 0.1
    caption_templates: tuple[str, ...] = ("{}",)
    num_workers: int = 0
    max_bad_share: float = 0.01
    cache: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) and its learning rate.

    Attributes:
        name: "muon" (Jordan et al. 2024) turns the momentum of every kernel into the
            nearest orthogonal matrix, and leaves the rest to AdamW with Nesterov's
            momentum: fewer steps.
        learning_rate: after the warm-up.
        schedule: what becomes of it from there to the last step: "linear" and
            "cosine" fall to `final_share` of it.
        warmup_steps: it rises linearly from 0 over so many.
        text_encoder_learning_rate: of the text towers, where they are trained; None:
            the same.
        clip_norm: largest norm of a gradient; None: no limit.
        accumulation: parts that a batch is worked on in, one after another.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    schedule: LearningRateSchedule = "constant"
    final_share: float = 0.0
    warmup_steps: int = 0
    text_encoder_learning_rate: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    accumulation: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The objective of latent diffusion; what is predicted is `ScheduleConfig`'s.

    Attributes:
        loss: "huber" is pseudo-Huber, √(d² + c²) − c.
        huber_c: its c.
        min_snr_gamma: γ of Hang et al. 2023, arXiv:2303.09556; None: weight 1.
        offset_noise: deviation of the noise that is the same over a whole channel.
        input_perturbation: deviation of noise added to the network's input alone.
        label_dropout: probability that a class is replaced by the last one, which
            stands for none. Captions are dropped where they are read
            (`DataConfig.caption_dropout`).
        train_text_encoder: whether the text towers learn too.
    """

    loss: Loss = "l2"
    huber_c: float = 0.001
    min_snr_gamma: float | None = None
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    label_dropout: float = 0.0
    train_text_encoder: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderLossConfig:
    """The objective of the first stage (Esser et al. 2021, arXiv:2012.09841).

    Attributes:
        pixel: the distance between a picture and its reconstruction.
        reduction: "sum" adds up a picture's elements (KL autoencoders), "mean" takes
            their mean (VQ).
        kl_weight: of the posterior's divergence, summed over a latent.
        codebook_weight: of the VQ loss.
        perceptual_weight: of LPIPS (Zhang et al. 2018, arXiv:1801.03924).
        perceptual_path: a file with LPIPS's weights; None: no perceptual term.
        discriminator_weight: of the adversarial term, before its adaptive factor; 0:
            no discriminator.
        discriminator_start: step from which it counts.
        discriminator_layers: strided layers of the patch discriminator.
    """

    pixel: Literal["l1", "l2"] = "l1"
    reduction: Literal["sum", "mean"] = "sum"
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    perceptual_weight: float = 1.0
    perceptual_path: str | None = None
    discriminator_weight: float = 0.5
    discriminator_start: int = 50_001
    discriminator_layers: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleGridConfig:
    """Pictures drawn on the way, for people to look at.

    Attributes:
        every_steps: None: none are drawn.
        prompts: one picture of each; of an autoencoder, its reconstructions instead.
    """

    every_steps: int | None = None
    prompts: tuple[str, ...] = ()
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    sampler: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and how many of those are kept.

    Attributes:
        keep_every_steps: checkpoints at multiples of it are kept for good.
    """

    every_steps: int | None = 1000
    every_minutes: float | None = 10.0
    keep: int = 3
    keep_every_steps: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        task: what learns: the U-Net (and the text towers, if told so), or the
            autoencoder.
        init_from: a model that `sdjax.load` reads: its config takes the place of
            `model`, its weights are where training begins. None: from scratch.
        autoencoder_from, text_encoder_from, tokenizer: models and a tokenizer folder
            that components are taken from, where training begins from scratch.
        ema_decay: of the parameters' moving average, whose decay at update n is at
            most (1 + n)/(10 + n); None: no average is kept.
        dtype: the networks compute in it; parameters are float32.
        remat: forgets activations and computes them again backwards: less memory,
            a third more work.
        on_nan: what a loss or gradient that is not finite does; the update is left out
            in either case.
    """

    task: Task = "diffusion"
    model: ModelConfig = ModelConfig()  # noqa: RUF009  it is frozen
    init_from: str | None = None
    autoencoder_from: str | None = None
    text_encoder_from: str | None = None
    tokenizer: str | None = None
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    autoencoder: AutoencoderLossConfig = AutoencoderLossConfig()
    samples: SampleGridConfig = SampleGridConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    steps: int = 1000
    seed: int = 0
    ema_decay: float | None = 0.9999
    dtype: Dtype = "float32"
    remat: bool = False
    on_nan: Literal["stop", "skip"] = "stop"
    log_every_steps: int = 10
