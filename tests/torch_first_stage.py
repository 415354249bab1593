"""The first stage's loss networks and training step in torch, from the papers."""

import torch
from torch import nn
from torch.nn import functional as F

VGG = (
    64,
    64,
    "M",
    128,
    128,
    "M",
    256,
    256,
    256,
    "M",
    512,
    512,
    512,
    "M",
    512,
    512,
    512,
)
TAPS = (3, 8, 15, 22, 29)
WIDTHS = (64, 128, 256, 512, 512)


class PatchGAN(nn.Module):
    def __init__(self, num_layers=3, width=64):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, num_layers + 1):
            out, stride = width * min(2**i, 8), 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(channels, out, 4, stride, 1, bias=False),
                nn.BatchNorm2d(out, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
            channels = out
        self.main = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, 1, 1))

    def forward(self, x):
        return self.main(x)


class LPIPS(nn.Module):
    """State dict as torchvision's VGG16 and the lpips package name it."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in VGG:
            if width == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        for i, width in enumerate(WIDTHS):
            linear = nn.Conv2d(width, 1, 1, bias=False)
            self.add_module(f"lin{i}", nn.ModuleDict({"model": Skipping(linear)}))

    def forward(self, x, y):
        total = 0.0
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        x, y = (x - shift) / scale, (y - shift) / scale
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if i in TAPS:
                linear = getattr(self, f"lin{TAPS.index(i)}")["model"]
                d = (self.unit(x) - self.unit(y)) ** 2
                total = total + linear(d).mean(dim=(1, 2, 3))
        return total

    @staticmethod
    def unit(x):
        return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


class Skipping(nn.Sequential):
    """A dropout that does nothing, so that the convolution is number 1."""

    def __init__(self, linear):
        super().__init__(nn.Identity(), linear)


def random_lpips(seed=0):
    """Weights of about VGG's size: features neither die nor blow up."""
    module, generator = LPIPS(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.startswith("lin"):
                p.copy_(noise.abs() * 0.1)
            elif p.ndim == 4:
                p.copy_(noise * (2 / p[0].numel()) ** 0.5)
            else:
                p.copy_(0.05 * noise)
    return module.requires_grad_(False).eval()


def losses(vae, discriminator, lpips, images, noise, settings, gate):
    """Both networks' losses and λ, as the original's LPIPSWithDiscriminator."""
    moments = vae.quant_conv(vae.encoder(images))
    mean, logvar = moments.chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    z = mean + (0.5 * logvar).exp() * noise
    x = vae.decoder(vae.post_quant_conv(z))
    d = (images - x).abs() if settings.pixel == "l1" else (images - x).square()
    if lpips is not None:
        d = d + settings.perceptual_weight * lpips(images, x).view(-1, 1, 1, 1)
    nll = d.sum() / len(images) if settings.reduction == "sum" else d.mean()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(images)
    total = nll + settings.kl_weight * kl
    if discriminator is None:
        return total, None, None
    g = -discriminator(x).mean()
    last = vae.decoder.conv_out.weight
    (nll_gradient,) = torch.autograd.grad(nll, last, retain_graph=True)
    (g_gradient,) = torch.autograd.grad(g, last, retain_graph=True)
    weight = (nll_gradient.norm() / (g_gradient.norm() + 1e-4)).clamp(0, 1e4)
    weight = weight.detach() * settings.discriminator_weight
    real, fake = discriminator(images), discriminator(x.detach())
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return total + gate * weight * g, gate * hinge, weight
