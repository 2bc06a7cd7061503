"""PatchGAN (Isola et al. 2017) with the hinge loss, as VQGAN uses it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evotok_plugin.common.processes import Processes


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) -> one logit per patch (B, 1, H', W')."""

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for index in range(1, num_layers + 1):
            wider = channels * min(2**index, 8)
            stride = 2 if index < num_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, wider), wider),  # batch statistics would couple the ranks
                nn.LeakyReLU(0.2),
            ]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The adversarial loss that the decoder minimizes."""
    return -fake_logits.mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Ratio of the two losses' gradient norms at the decoder's last layer (Esser et al. 2021, eq. 7), in 0..1e4.

    The gradients are summed over all processes, so that every process gets the same weight.
    """
    gradients = torch.stack(
        [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    )
    Processes.current().add_up(gradients)
    reconstruction_norm, adversarial_norm = (gradient.norm() for gradient in gradients)
    return (reconstruction_norm / (adversarial_norm + 1e-4)).clamp(0, 1e4).detach()
