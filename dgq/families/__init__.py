"""The networks that dgq knows, a file each (docs/architecture.md); what they answer is told in `dgq.family`."""

from ..family import DECODERS, ENCODERS, FAMILIES
from .autoencoder_kl import AutoencoderKL
from .flux import Flux
from .flux2 import Flux2
from .pixart import PixArt
from .qwen_image import QwenImage
from .sana import Sana
from .sd3 import StableDiffusion3
from .text_encoder import TextEncoder
from .unet import UNet
from .z_image import ZImage

FAMILIES[:] = [UNet(), StableDiffusion3(), Flux(), Flux2(), PixArt(), ZImage(), QwenImage(), Sana()]
DECODERS[:] = [AutoencoderKL()]
ENCODERS[:] = [TextEncoder()]
