"""The networks that dgq knows, a file each (docs/architecture.md); what they answer is told in `dgq.family`."""

from ..family import FAMILIES
from .pixart import PixArt
from .unet import UNet

FAMILIES[:] = [UNet(), PixArt()]
