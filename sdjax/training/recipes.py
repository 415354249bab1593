"""What several configs share."""

from sdjax.config import AutoencoderConfig, ModelConfig
from sdjax.training.config import (
    AutoencoderLossConfig,
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    SampleGridConfig,
    TrainConfig,
)


def ldm_autoencoder(
    vae: AutoencoderConfig,
    *,
    loss: AutoencoderLossConfig,
    batch_size: int,
    steps: int,
) -> TrainConfig:
    """An autoencoder of latent diffusion, on random crops of 256×256 pixels.

    Adam at 4.5e-6 for each picture of the batch; Rombach et al. 2022, appendix G,
    arXiv:2112.10752.
    """
    return TrainConfig(
        task="autoencoder",
        model=ModelConfig(vae=vae, text_encoder=None, sample_size=256),
        data=DataConfig(
            batch_size=batch_size,
            resolution=256,
            crop="random",
            caption_dropout=0.0,
            num_workers=8,
        ),
        optimizer=OptimizerConfig(
            learning_rate=4.5e-6 * batch_size,
            b1=0.5,
            b2=0.9,
            weight_decay=0.0,
            clip_norm=None,
        ),
        autoencoder=loss,
        samples=SampleGridConfig(every_steps=5000),
        checkpoints=CheckpointConfig(keep_every_steps=50_000),
        steps=steps,
        ema_decay=None,
    )
