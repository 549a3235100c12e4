"""LPIPS (Zhang et al., arXiv 1801.03924), a learned distance of pictures: version 0.1 on AlexNet, from local weights.

The network is written out here, since torchmetrics asks torchvision for it. The backbone's weights are the user's own;
the heads are in the same place, or are those that torchmetrics has in its package.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ..errors import DgqError
from .features import pixels

# of torchvision's alexnet: number in `features`, channels in and out, kernel, stride, padding; and where LPIPS pools
_LAYERS = (
    (0, 3, 64, 11, 4, 2),
    (3, 64, 192, 5, 1, 2),
    (6, 192, 384, 3, 1, 1),
    (8, 384, 256, 3, 1, 1),
    (10, 256, 256, 3, 1, 1),
)
_POOLED = (3, 6)  # inputs of these
_SMALLEST = 31  # pixels of a side of which the second pooling leaves one
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of colours in -1..1
_EPSILON = 1e-10
_ENDINGS = (".safetensors", ".pth", ".pt")
# what files of these networks hold besides: AlexNet's classifier, LPIPS's colours, and its heads a second time
_UNREAD = ("classifier.", "scaling_layer.", "lins.")
_HINT = "give torchvision's AlexNet, as a .safetensors or a .pth of tensors alone"


class Lpips:
    """The distance, with weights from local files.

    Attributes:
        convolutions: (weight, bias) of AlexNet's five, float32.
        heads: weight of each channel of their outputs, float32 (1, C, 1, 1).
    """

    def __init__(self, place: Path) -> None:
        """Read the weights.

        Args:
            place: a safetensors file, or a torch file of tensors alone (.pth, .pt), or a folder of such files. It holds
                AlexNet as torchvision names its tensors (features.0.weight), or a whole LPIPS (net.slice1.0.weight);
                and the heads as LPIPS names them (lin0.model.1.weight), else they are torchmetrics'.

        Raises:
            DgqError: a file that cannot be read; a tensor that is missing, unknown, misshapen, not finite, or in two
                files.
        """
        files = [place]
        if place.is_dir():
            files = sorted(file for file in place.iterdir() if file.suffix.lower() in _ENDINGS and file.is_file())
            if not files:
                raise DgqError(f"{place}: holds no weights ({', '.join(_ENDINGS)})", _HINT)
        found: dict[str, Tensor] = {}
        for file in files:
            tensors = _read(file)
            if twice := sorted(found.keys() & tensors.keys()):
                raise DgqError(f"{file}: tensor {twice[0]!r} is in another file too", "give one network alone")
            found |= tensors
        self.convolutions = []
        for k, (number, inputs, outputs, kernel, _, _) in enumerate(_LAYERS, 1):
            names = [name for name in (f"features.{number}", f"net.slice{k}.{number}") if f"{name}.weight" in found]
            name = names[0] if names else f"features.{number}"
            weight = _take(found, f"{name}.weight", (outputs, inputs, kernel, kernel), place)
            self.convolutions.append((weight, _take(found, f"{name}.bias", (outputs,), place)))
        heads, source = found, place
        if not any(name.startswith("lin") for name in found):
            source = _packaged_heads(place)
            heads = _read(source)
        self.heads = [
            _take(heads, f"lin{k}.model.1.weight", (1, layer[2], 1, 1), source) for k, layer in enumerate(_LAYERS)
        ]
        if found:
            raise DgqError(f"{place}: tensor {min(found)!r} is none of AlexNet's or LPIPS's", _HINT)

    @torch.no_grad()
    def __call__(self, a: Image.Image, b: Image.Image) -> float:
        """The distance of two pictures of one size: 0 where they are equal, larger the less alike they look.

        Raises:
            DgqError: they are smaller than 31 pixels.
            ValueError: they are of different sizes.
        """
        if a.size != b.size:
            raise ValueError(f"pictures of {a.size} and {b.size} pixels cannot be compared")
        if min(a.size) < _SMALLEST:
            size = f"{a.width} x {a.height}"
            raise DgqError(f"LPIPS: pictures of {size} pixels are too small", f"it takes {_SMALLEST} a side and more")
        shift, scale = (torch.tensor(values)[:, None, None] for values in (_SHIFT, _SCALE))
        x = torch.stack([pixels(image) for image in (a, b)]).float() / 127.5 - 1
        x = (x - shift) / scale
        total = 0.0
        for (number, _, _, _, stride, padding), (weight, bias), head in zip(
            _LAYERS, self.convolutions, self.heads, strict=True
        ):
            if number in _POOLED:
                x = F.max_pool2d(x, 3, 2)
            x = F.conv2d(x, weight, bias, stride, padding).relu()
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + _EPSILON)
            total += float((head[0] * (unit[0] - unit[1]).square()).sum(0).mean())
        return total


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that LPIPS reads, or should know; one that is not of tensors alone is never run."""
    try:
        if file.suffix.lower() == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, weights_only=True, map_location="cpu")
    except Exception:  # torch's reader of damaged files raises whatever their bytes lead it to
        raise DgqError(f"{file}: cannot be read as weights", _HINT) from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DgqError(f"{file}: holds other things than named tensors", _HINT)
    return {name: value for name, value in found.items() if not name.startswith(_UNREAD)}


def _take(found: dict[str, Tensor], name: str, shape: tuple[int, ...], place: Path) -> Tensor:
    """A tensor that has to be there, as float32; it is taken out of what was found."""
    if name not in found:
        raise DgqError(f"{place}: tensor {name!r} is missing", _HINT)
    tensor = found.pop(name)
    if tuple(tensor.shape) != shape:
        raise DgqError(f"{place}: tensor {name!r} is {tuple(tensor.shape)}, AlexNet's is {shape}", _HINT)
    if not tensor.isfinite().all():
        raise DgqError(f"{place}: tensor {name!r} has values that are not finite", _HINT)
    return tensor.float()


def _packaged_heads(place: Path) -> Path:
    """torchmetrics' file of the heads; the package itself is not imported."""
    package = importlib.util.find_spec("torchmetrics")
    for folder in (package.submodule_search_locations or ()) if package else ():
        file = Path(folder) / "functional" / "image" / "lpips_models" / "alex.pth"
        if file.is_file():
            return file
    raise DgqError(
        f"{place}: the heads of LPIPS are missing (lin0.model.1.weight)",
        'put LPIPS\'s alex.pth into a folder with the backbone, or pip install "dgq[eval]"',
    )
