"""What is written for the systems: streams of tensors, float and quantized UNets, calls."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dgq.bench import files
from dgq.bench.systems import Worker
from dgq.bench.worker import Spec
from dgq.checkpoint.reading import read_header
from dgq.checkpoint.writing import WEIGHTS_NAME
from dgq.errors import DgqError
from dgq.integer.attention import LogAttnProcessor
from dgq.integer.channels import to_matrix
from dgq.integer.folding import fold
from dgq.integer.layer import IntegerLayer
from dgq.replay import take_apart

TENSORS = {
    "a.weight": torch.randn(3, 5),
    "a.bias": torch.randn(3).to(torch.bfloat16),
    "half": torch.randn(1, 2, 2).half(),
    "codes": torch.randint(-127, 128, (7,), dtype=torch.int8),
    "packed": torch.arange(4, dtype=torch.uint8).view(2, 2),
    "order": torch.arange(3, dtype=torch.int32),
    "scalar": torch.tensor(2.5),
}
SPECS = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def test_a_stream_is_what_safetensors_reads(tmp_path: Path) -> None:
    files.stream_safetensors(tmp_path / "x.safetensors", SPECS, iter(TENSORS.values()))
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_a_stream_casts_to_its_specs_and_takes_views(tmp_path: Path) -> None:
    matrix = torch.randn(4, 6)
    files.stream_safetensors(tmp_path / "x.safetensors", {"t": ((6, 4), torch.bfloat16)}, [matrix.t()])
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], matrix.t().to(torch.bfloat16))


def test_a_stream_of_other_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a: \(2,\) instead of \(3,\)"):
        files.stream_safetensors(tmp_path / "1", {"a": ((3,), torch.float32)}, [torch.zeros(2)])
    with pytest.raises(ValueError, match="shorter"):
        files.stream_safetensors(tmp_path / "2", SPECS, list(TENSORS.values())[:2])


def test_calls_come_back_as_they_were(tmp_path: Path) -> None:
    calls = [
        {
            "sample": torch.randn(1, 4, 2, 2).contiguous(memory_format=torch.channels_last),
            "timestep": torch.tensor(i),
            "added_cond_kwargs": {"text_embeds": torch.randn(1, 3), "time_ids": torch.randn(1, 6)},
            "shapes": [[1, 2]],
        }
        for i in range(11)
    ]
    files.save_calls(calls, tmp_path / "calls")
    read = files.load_calls(tmp_path / "calls")
    assert len(read) == 11
    for call, again in zip(calls, read, strict=True):
        assert again.keys() == call.keys()
        assert again["shapes"] == [[1, 2]]
        assert torch.equal(again["sample"], call["sample"])
        assert torch.equal(again["timestep"], call["timestep"])
        assert torch.equal(again["added_cond_kwargs"]["time_ids"], call["added_cond_kwargs"]["time_ids"])


def test_a_flat_unet_puts_its_tensors_back_in_place() -> None:
    class Echo(torch.nn.Module):
        def forward(
            self, sample: Tensor, added: dict[str, Tensor], parts: list[Tensor], scale: float, return_dict: bool
        ) -> tuple[Tensor]:
            assert not return_dict
            return (scale * sample - added["b"] + parts[1],)

    parts = [torch.zeros(2), torch.tensor([0.5, 0.25])]
    call = {"sample": torch.ones(2), "added": {"b": torch.tensor([3.0, 4.0])}, "parts": parts, "scale": 2.0}
    form, tensors = take_apart(call)
    assert len(tensors) == 4
    assert torch.equal(files._Flat(Echo(), form)(*tensors), torch.tensor([-0.5, -1.75]))


@pytest.fixture(scope="module")
def float_model(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 UNet of random weights."""
    folder = tmp_path_factory.mktemp("float") / "model"
    files.random_model(json.loads(small_config.read_text()), str(folder), "float32")
    return folder


def test_random_models_of_two_dtypes_have_the_same_weights(
    float_model: Path, small_config: Path, tmp_path: Path
) -> None:
    files.random_model(json.loads(small_config.read_text()), str(tmp_path / "half"), "bfloat16")
    full = load_file(float_model / "unet" / WEIGHTS_NAME)
    half = load_file(tmp_path / "half" / "unet" / WEIGHTS_NAME)
    assert full.keys() == half.keys()
    assert all(torch.equal(full[name].to(torch.bfloat16), half[name]) for name in full)
    unet = files.load_network(float_model, torch.float32)
    assert torch.equal(unet.conv_in.weight, full["conv_in.weight"])
    assert 0.5 < float(unet.conv_in.weight.detach().std() * (4 * 9) ** 0.5) < 1.5


@pytest.mark.parametrize("wbits", [8, 4])
def test_a_quantized_model_holds_the_float_models_weights(float_model: Path, tmp_path: Path, wbits: int) -> None:
    files.quantized_model(str(float_model), str(tmp_path / "quantized"), wbits)
    header = read_header(tmp_path / "quantized")
    assert header is not None
    assert header.recipe.wbits == wbits
    source = files.load_network(float_model, torch.float32)
    unet = files.load_network(tmp_path / "quantized", torch.float32)  # strict: names, shapes and types of all tensors
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, IntegerLayer)}
    assert {name: layer.plan for name, layer in layers.items()} == header.layers
    source.requires_grad_(False)
    assert all(isinstance(processor, LogAttnProcessor) for processor in unet.attn_processors.values())
    for name, layer in layers.items():
        owner = source.get_submodule(layer.plan.owner(name))
        weight = owner.weight[:, slice(*layer.plan.columns)] if layer.plan.columns else owner.weight
        matrix = to_matrix(fold(weight) if layer.plan.upsampled else weight)
        stored = layer.natural_weight * layer.weight_scale[:, None]
        assert float((stored - matrix).norm() / matrix.norm()) < (0.01 if wbits == 8 else 0.2), name
        copies = 4 if layer.plan.upsampled else 1
        assert not layer.plan.bias or torch.equal(layer.bias, owner.bias.repeat(copies))
    assert torch.equal(unet.conv_norm_out.weight, source.conv_norm_out.weight.half().float())


def test_a_failed_task_is_told_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DgqError, match=r"writing the random files failed: .*nosuch") as caught:
        files.write("random", config={}, target=tmp_path / "out", dtype="nosuch")
    assert "\n" not in caught.value.message
    with pytest.raises(DgqError, match=r"^the UNet's configuration cannot be used"):
        files.random_model({"down_block_types": ["NoBlock"]}, str(tmp_path / "out"), "float32")
    assert list(tmp_path.iterdir()) == []


def test_a_stream_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Each tensor is written before the next is asked for."""
    file = tmp_path / "x.safetensors"
    sizes: list[int] = []

    def tensors() -> Iterator[Tensor]:
        for _ in range(3):
            sizes.append(file.stat().st_size)
            yield torch.zeros(2**20)

    files.stream_safetensors(file, dict.fromkeys("abc", ((2**20,), torch.float32)), tensors())
    assert sizes[2] - sizes[1] == 2**22


def test_nothing_is_imported_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "random", "dgq", "diffusers"):
        (tmp_path / f"{name}.py").write_text(f"open('{name}-was-here', 'w')\nraise SystemExit('poisoned')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as in an interactive Python
    with pytest.raises(DgqError, match=r"nosuch: has no unet nor transformer$"):
        files.write("dgq", source=tmp_path / "nosuch", target=tmp_path / "out", wbits=8)
    spec = Spec("torch", str(tmp_path / "nosuch"), "float32", str(tmp_path / "nosuch"))
    with pytest.raises(DgqError, match="nosuch"):
        Worker(spec)
    assert not list(tmp_path.glob("*-was-here"))
