r"""The KL autoencoder with f = 8 and 4 channels, that of Stable Diffusion.

    sdjax train configs/ldm_kl_f8.py --set data.path=PICTURES \
        --set autoencoder.perceptual_path=LPIPS --workdir RUN

The recipe of latent diffusion (Rombach et al. 2022, appendix G, arXiv:2112.10752): L1
and LPIPS summed over a picture, the posterior's divergence at 1e-6, after 50,000 steps
a patch discriminator whose weight adapts. Adam at 4.5e-6 for each picture of the batch.

Hardware: eight devices, 4 pictures of 256×256 on each; 84 million parameters,
and 2.8 million of the discriminator. The rate follows the
batch.

What to expect: the published one, trained on OpenImages for 246,803 steps, has a PSNR
of 24.2 dB and an rFID of 0.90 on ImageNet's validation pictures. LPIPS is a file of
weights that the user has; without it pictures come out softer.
"""

from sdjax.presets import KL_F8
from sdjax.training.config import AutoencoderLossConfig, TrainConfig
from sdjax.training.recipes import ldm_autoencoder


def get_config() -> TrainConfig:
    """The run; `data.path` and LPIPS are the user's."""
    return ldm_autoencoder(
        KL_F8,
        loss=AutoencoderLossConfig(
            reduction="sum",
            kl_weight=1e-6,
            discriminator_weight=0.5,
            discriminator_start=50_001,
        ),
        batch_size=32,
        steps=5000,
    )
