"""diffusers loads a dgq checkpoint after `import dgq`, silently and unchanged by dtype."""

import subprocess
import sys

import pytest
import torch
from comparing import assert_close

import dgq
from dgq.integer.attention import LogAttnProcessor
from dgq.integer.layer import IntegerLayer
from dgq.integer.skeleton import stored_names

SCRIPT = """
import sys, torch
import dgq
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
print(type(pipe.unet.get_submodule("mid_block.resnets.0.conv1")).__name__, pipe.unet.dtype)
"""


def test_from_pretrained_gives_no_warnings(tiny_checkpoint):
    run = subprocess.run(
        [sys.executable, "-W", "default::UserWarning", "-c", SCRIPT, str(tiny_checkpoint)],
        capture_output=True,
        text=True,
        check=True,
        env=None,
    )
    assert run.stdout.split() == ["IntegerConv2d", "torch.float32"]
    # bars of progress; and transformers says of itself that torchvision is missing, with dgq or without
    progress = ("it/s]", "s/it]", "requires torchvision")
    own = [line for line in run.stderr.splitlines() if not any(words in line for words in progress)]
    noise = [line for line in own if line]
    assert noise == []


@torch.no_grad()
def test_dtype_changes_what_is_float_and_nothing_else(tiny_checkpoint):
    plain, half = dgq.load(tiny_checkpoint), dgq.load(tiny_checkpoint, dtype=torch.bfloat16)
    assert half.unet.conv_in.weight.dtype == torch.bfloat16
    a, b = plain.unet.state_dict(), half.unet.state_dict()
    for name, module in plain.unet.named_modules():
        if isinstance(module, IntegerLayer):
            for leaf in module.state_dict():
                assert torch.equal(a[f"{name}.{leaf}"], b[f"{name}.{leaf}"])
    call = {"timestep": torch.tensor(500), "encoder_hidden_states": torch.randn(1, 24, 32)}
    sample = torch.randn(1, 4, 8, 8)
    x = plain.unet(sample, **call).sample
    call["encoder_hidden_states"] = call["encoder_hidden_states"].bfloat16()
    y = half.unet(sample.bfloat16(), **call).sample
    assert_close("output", y, x, 0.25)  # bfloat16 around the integers


def test_quantized_model_refuses_a_cast_and_survives_a_move(tiny_checkpoint):
    pipe = dgq.load(tiny_checkpoint)
    with pytest.raises(ValueError, match="quantized"):
        pipe.unet.to(torch.float16)
    pipe.to("cpu")
    assert pipe.unet.get_submodule("mid_block.resnets.0.conv1").weight_scale.dtype == torch.float32


def test_attention_processors_are_set(tiny_checkpoint):
    pipe = dgq.load(tiny_checkpoint)
    assert all(isinstance(p, LogAttnProcessor) for p in pipe.unet.attn_processors.values())


@torch.no_grad()
def test_saved_again_it_is_the_same(tiny_checkpoint, tmp_path):
    from diffusers import UNet2DConditionModel

    unet = dgq.load(tiny_checkpoint).unet
    unet.save_pretrained(tmp_path / "unet")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, again[name])


def test_loaded_model_holds_no_float_weight(tiny_checkpoint):
    """Every float of a quantized layer is per channel: scales, biases, divisors."""
    unet = dgq.load(tiny_checkpoint).unet
    unet(torch.randn(1, 4, 8, 8), 500, torch.randn(1, 24, 32))
    layers = [module for module in unet.modules() if isinstance(module, IntegerLayer)]
    assert len(layers) == 85
    for layer in layers:
        ready = layer.prepare(torch.device("cpu"))
        tensors = [*layer.state_dict().values(), ready.column_sum, *ready.tensors]
        longest = max(layer.in_features, layer.out_features)
        assert all(tensor.numel() <= longest for tensor in tensors if tensor.is_floating_point())
    kept = {name.rpartition(".")[0] for name in dict(unet.named_parameters()).keys() - stored_names(unet)}
    assert all("norm" in name or name in ("conv_in", "conv_out") for name in kept)
