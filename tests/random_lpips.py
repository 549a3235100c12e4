"""LPIPS with random weights: AlexNet's convolutions and the heads, as their files name them."""

import torch
from torch import Tensor, nn

CHANNELS = (64, 192, 384, 256, 256)


def alexnet() -> nn.Sequential:
    """AlexNet's convolutions as they are published, with random weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def heads() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for k, c in enumerate(CHANNELS)}


def backbone() -> dict[str, Tensor]:
    """As torchvision stores it, with a classifier."""
    stored = {f"features.{name}": value for name, value in alexnet().state_dict().items()}
    return stored | {"classifier.6.weight": torch.zeros(10, 4)}
