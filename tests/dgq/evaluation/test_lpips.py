"""LPIPS with random weights, and what is said of files that are none of it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_lpips import alexnet, backbone, heads
from safetensors.torch import save_file
from torch import Tensor, nn

from dgq.errors import DgqError
from dgq.evaluation.features import pixels
from dgq.evaluation.lpips import Lpips


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(backbone() | heads(), tmp_path / "lpips.safetensors")
    return tmp_path / "lpips.safetensors"


def picture(noise: float, size: tuple[int, int] = (48, 64)) -> Image.Image:
    """A slope of colours under so much noise, which is the same but for its strength."""
    generator = torch.Generator().manual_seed(2)
    x = torch.linspace(0.2, 0.8, size[0])[None, :, None] * torch.tensor([1.0, 0.6, 0.3])
    x = x + noise * torch.randn(size[1], size[0], 3, generator=generator)
    return Image.fromarray((x.clamp(0, 1) * 255).byte().numpy())


@torch.no_grad()
def test_is_the_published_distance(file: Path) -> None:
    """Pixel by pixel: features of unit length, their squared difference weighted by channel."""
    a, b = picture(0), picture(0.1)
    expected = 0.0
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's, of 0..1
    x, y = (((pixels(one).permute(1, 2, 0) / 255 - mean) / std).permute(2, 0, 1)[None] for one in (a, b))
    weights = iter(heads().values())
    for module in alexnet():
        x, y = module(x), module(y)
        if isinstance(module, nn.ReLU):
            weight = next(weights).flatten()
            places = [(i, j) for i in range(x.shape[2]) for j in range(x.shape[3])]
            for i, j in places:
                u, v = x[0, :, i, j], y[0, :, i, j]
                expected += float((weight * (u / u.norm() - v / v.norm()) ** 2).sum()) / len(places)
    found = Lpips(file)(a, b)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found > 0.01


def test_is_nothing_of_equal_pictures_symmetric_and_grows_with_noise(file: Path) -> None:
    lpips, plain = Lpips(file), picture(0)
    found = [lpips(plain, picture(noise)) for noise in (0, 0.02, 0.1, 0.4)]
    assert found[0] == 0
    assert found == sorted(set(found))
    assert lpips(picture(0.1), plain) == pytest.approx(found[2], rel=1e-6)


def test_all_forms_of_the_weights_give_the_same(file: Path, tmp_path: Path) -> None:
    pair = picture(0), picture(0.2)
    expected = Lpips(file)(*pair)
    torch.save(backbone() | heads(), tmp_path / "one.pth")
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(backbone(), folder / "alexnet.safetensors")
    torch.save(heads(), folder / "alex.pth")
    (folder / "README.md").write_text("not read")
    slices = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
    whole = {f"net.slice{slices[int(n.split('.')[0])]}.{n}": value for n, value in alexnet().state_dict().items()}
    again = {f"lins.{name[3:]}": value for name, value in heads().items()}
    torch.save(whole | heads() | again | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, tmp_path / "whole.pt")
    for place in (tmp_path / "one.pth", folder, tmp_path / "whole.pt"):
        assert Lpips(place)(*pair) == expected


def test_heads_of_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found in its package, which is not imported; where it is not installed, it is said what is missing."""
    save_file(backbone(), tmp_path / "alexnet.safetensors")
    monkeypatch.delitem(sys.modules, "torchmetrics", raising=False)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(DgqError, match="heads of LPIPS are missing"):
        Lpips(tmp_path / "alexnet.safetensors")
    packaged = tmp_path / "torchmetrics" / "functional" / "image" / "lpips_models"
    packaged.mkdir(parents=True)
    (tmp_path / "torchmetrics" / "__init__.py").write_text("raise AssertionError('was imported')")
    torch.save(heads(), packaged / "alex.pth")
    save_file(backbone() | heads(), tmp_path / "both.safetensors")
    pair = picture(0), picture(0.2)
    assert Lpips(tmp_path / "alexnet.safetensors")(*pair) == Lpips(tmp_path / "both.safetensors")(*pair)


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in (backbone() | heads()).items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (lambda: without("features.8.bias"), r"w\.safetensors: tensor 'features\.8\.bias' is missing"),
        (lambda: without("lin3.model.1.weight"), r"tensor 'lin3\.model\.1\.weight' is missing"),
        (
            lambda: backbone() | heads() | {"features.0.weight": torch.zeros(64, 3, 3, 3)},
            r"'features\.0\.weight' is \(64, 3, 3, 3\), AlexNet's is \(64, 3, 11, 11\)",
        ),
        (lambda: backbone() | heads() | {"features.12.weight": torch.zeros(1)}, r"'features\.12\.weight' is none of"),
        (lambda: backbone() | heads() | {"features.3.bias": torch.full((192,), torch.nan)}, "not finite"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, tensors: Callable[[], dict[str, Tensor]], said: str) -> None:
    save_file(tensors(), tmp_path / "w.safetensors")
    with pytest.raises(DgqError, match=said) as caught:
        Lpips(tmp_path / "w.safetensors")
    assert caught.value.hint


class Planted:
    """What runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.file,)


def test_a_file_of_other_things_is_refused_and_not_run(tmp_path: Path) -> None:
    planted = tmp_path / "ran"
    torch.save({"features.0.weight": Planted(planted)}, tmp_path / "planted.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x40" * 30)
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name, said in (
        ("planted.pth", "cannot be read as weights"),
        ("cut.safetensors", "cannot be read as weights"),
        ("empty.pth", "cannot be read as weights"),
        ("list.pth", "holds other things than named tensors"),
    ):
        with pytest.raises(DgqError, match=said) as caught:
            Lpips(tmp_path / name)
        assert caught.value.message.startswith(str(tmp_path / name))
        assert "\n" not in caught.value.message
    assert not planted.exists()


def test_a_folder_without_weights_or_with_two_networks_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DgqError, match="none: holds no weights"):
        Lpips(tmp_path / "none")
    torch.save(heads(), tmp_path / "vgg.pth")
    with pytest.raises(DgqError, match=r"vgg\.pth: tensor 'lin0\.model\.1\.weight' is in another file too"):
        Lpips(tmp_path)


def test_small_pictures(file: Path) -> None:
    lpips = Lpips(file)
    assert lpips(picture(0, (31, 40)), picture(0.2, (31, 40))) > 0
    with pytest.raises(DgqError, match="30 x 40 pixels are too small"):
        lpips(picture(0, (30, 40)), picture(0.2, (30, 40)))
