r"""Stable Diffusion 2 from scratch, as MLPerf's training benchmark defines it.

    sdjax train configs/sd2_mlperf.py --set autoencoder_from=SD2_BASE \
        --set text_encoder_from=SD2_BASE --set data.cache=MOMENTS --workdir RUN

The benchmark of MLPerf Training v3.1 to v5.0: the U-Net of SD 2 with 16 groups in its
norms instead of 32, drawn at random, predicts v; autoencoder and OpenCLIP-H are those
of SD 2 base and do not learn. The data are 6.5 million captioned pictures of LAION-400M
at 512×512, as posterior moments that `sdjax cache` wrote. No caption is dropped, no
average kept, no dropout. The learning rate is 1.25e-7 for each picture of the batch,
after 1000 steps of warm-up.

Hardware: 64 devices of 80 GB, 32 pictures on each; 8 with `--set
optimizer.accumulation=8`. For another batch change BATCH: rate and checkpoints follow.

What to expect: the target, FID at most 90 and CLIP score at least 0.15 on 30,000
captions of COCO 2014 (50 DDIM steps, guidance 8), after 1,750 to 2,000 steps. Those
cost 13 EFLOP: 0.8 TFLOP for each picture forward, four times that with gradients and
rematerialisation. A checkpoint falls on every 512,000 pictures.
"""

from sdjax.presets import MLPERF_SD2
from sdjax.training.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
)

BATCH = 2048
PICTURES_PER_CHECKPOINT = 512_000


def get_config() -> TrainConfig:
    """The run; the weights to start from and the cache are the user's."""
    every = -(-PICTURES_PER_CHECKPOINT // BATCH)
    return TrainConfig(
        model=MLPERF_SD2,
        data=DataConfig(batch_size=BATCH, resolution=512, caption_dropout=0.0),
        optimizer=OptimizerConfig(
            learning_rate=1.25e-7 * BATCH, warmup_steps=1000, clip_norm=None
        ),
        checkpoints=CheckpointConfig(every_steps=every, keep_every_steps=every),
        steps=2000,
        ema_decay=None,
        dtype="bfloat16",
        remat=True,
    )
