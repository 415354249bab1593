r"""The VQ autoencoder with f = 8 and 16,384 codes of 4 channels.

    sdjax train configs/ldm_vq_f8.py --set data.path=PICTURES \
        --set autoencoder.perceptual_path=LPIPS --workdir RUN

The recipe of latent diffusion (Rombach et al. 2022, appendix G, arXiv:2112.10752): the
mean of L1 and LPIPS, the codebook's loss, a small patch discriminator
from the first step on. Adam at 4.5e-6 for each picture of the batch, which is our
choice.

Hardware: eight devices, 8 pictures of 256×256 on each; 68 million parameters,
and 0.7 million of the discriminator. The rate follows the
batch.

What to expect: the published one, trained on OpenImages for 971,043 steps, has a PSNR
of 23.1 dB and an rFID of 1.14 on ImageNet's validation pictures. LPIPS is a file of
weights that the user has; without it pictures come out softer.
"""

from sdjax.presets import VQ_F8
from sdjax.training.config import AutoencoderLossConfig, TrainConfig
from sdjax.training.recipes import ldm_autoencoder


def get_config() -> TrainConfig:
    """The run; `data.path` and LPIPS are the user's."""
    return ldm_autoencoder(
        VQ_F8,
        loss=AutoencoderLossConfig(
            reduction="mean",
            codebook_weight=1.0,
            discriminator_weight=0.6,
            discriminator_start=1,
            discriminator_layers=2,
        ),
        batch_size=64,
        steps=5000,
    )
