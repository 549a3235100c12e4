"""Adapters of peft on quantized pipelines: loaded, mixed, taken off, trained, and what stays fused beside them."""

import json
import math
from collections import OrderedDict

import original_names
import peft
import pytest
import tiny_pipelines
import tiny_transformers
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from peft.tuners.lora import LoraLayer
from pretended_devices import Pretended
from safetensors.torch import load_file, save_file
from torch import nn

import dgq
from dgq.errors import DgqError
from dgq.integer.adapters import Adapted, direct
from dgq.integer.fused_unet import FoldedUpsample
from dgq.integer.layer import IntegerLayer
from dgq.integer.shared_input import prepare_all
from dgq.integer.stored import StoredWeight
from dgq.recipe import LayerPlan, Recipe
from dgq_kernels import native

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {
    "attention": ATTENTION,
    "pixels": ["proj_in", "proj_out"],
    "feed-forward": ["ff.net.0.proj", "ff.net.2"],
    "convolutions": ["conv1", "conv2", "time_emb_proj", "linear_2", "conv_shortcut"],
}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def folders(request, tiny_pipeline, tiny_checkpoint, tmp_path_factory):
    """(a float pipeline, its checkpoint; SDXL's text encoders are quantized too)."""
    if request.param == "sd":
        return tiny_pipeline, tiny_checkpoint
    from dgq.calibration.run import Options, calibrate

    base = tmp_path_factory.mktemp("sdxl")
    plain = tiny_pipelines.sdxl(base / "float")
    recipe = Recipe(wbits=8, rounding="nearest")
    calibrate(plain, base / "w8", recipe, Options(prompts=["a cat"], steps=1, evaluate=0, text_encoder="int8"))
    return plain, base / "w8"


@pytest.fixture
def pipe(folders):
    made = dgq.load(folders[1], device="cpu")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def unet(tiny_checkpoint):
    return dgq.load(tiny_checkpoint, device="cpu").unet


def draw(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=1, generator=generator, output_type="pt", height=16, width=16, **options)[
        0
    ]


def call(unet, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, 32, generator=generator)
    with torch.no_grad():
        return unet(sample.to(dtype), torch.tensor(500), text.to(dtype)).sample


def distance(a, b):
    return float((a - b).float().norm() / b.float().norm())


def add(unet, targets=ATTENTION, name="one", **options):
    torch.manual_seed(len(name))
    given = {"r": 4, "lora_alpha": 4, "init_lora_weights": False, **options}
    unet.add_adapter(peft.LoraConfig(target_modules=targets, **given), name)


def lora_files(folder, place, seed, text=False, targets=(*ATTENTION, "ff.net.2", "proj_in"), **options):
    """A LoRA of a float pipeline, as `save_lora_weights` of diffusers writes it; the file."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"r": 4, "lora_alpha": 4, "init_lora_weights": False, **options}
    pipe.unet.add_adapter(peft.LoraConfig(target_modules=list(targets), **shape))
    layers = {"unet_lora_layers": peft.get_peft_model_state_dict(pipe.unet)}
    for name in ("text_encoder", "text_encoder_2"):
        if text and hasattr(pipe, name):
            encoder = getattr(pipe, name)
            encoder.add_adapter(peft.LoraConfig(target_modules=["q_proj", "out_proj"], **shape))
            layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(encoder)
    pipe.save_lora_weights(place, **layers)
    return place / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("targets", TARGETS)
def test_fused_layers_stay_fused_and_give_what_peft_gives(unet, targets):
    plain = call(unet)
    add(unet, TARGETS[targets], "one", lora_alpha=2)
    add(unet, TARGETS[targets], "other", r=2)
    unet.set_adapters(["one", "other"], [0.7, 0.4])
    wrapped = [module for module in unet.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    quantized = [module for module in wrapped if isinstance(module.get_base_layer(), IntegerLayer)]
    with torch.no_grad():
        assert all(isinstance(direct(module), Adapted) for module in quantized)
        got = call(unet)
        hooks = [module.register_forward_hook(lambda *_: None) for module in wrapped]
        assert all(direct(module) is None for module in quantized)
        expected = call(unet)  # every adapter is called as peft has it
    for hook in hooks:
        hook.remove()
    assert distance(got, expected) < 0.04 < 0.06 < distance(got, plain)  # a norm rounded otherwise moves single codes
    unet.disable_adapters()
    assert torch.equal(call(unet), plain)
    unet.enable_adapters()
    assert torch.equal(call(unet), got)
    unet.delete_adapters(["one", "other"])
    assert torch.equal(call(unet), plain)


@pytest.mark.parametrize("size", [None, (13, 9), (14, 10)])
def test_a_folded_upsampler_with_an_adapter_gets_what_the_float_one_does(unet, size):
    (name,) = [name for name, module in unet.named_modules() if type(module) is FoldedUpsample]
    upsampler, x = unet.get_submodule(name), torch.randn(2, unet.get_submodule(name).channels, 7, 5)
    with torch.no_grad():
        plain = upsampler(x, size)
        add(unet, [f"{name}.conv"], init_lora_weights=False)
        wrapped = upsampler.conv
        assert isinstance(wrapped, LoraLayer)
        assert wrapped.lora_A["one"].weight.shape[2:] == (3, 3)
        large = nn.functional.interpolate(x, size=size or (14, 10))
        branch = wrapped.lora_B["one"](wrapped.lora_A["one"](large))
        assert branch.norm() > plain.norm() / 10
        torch.testing.assert_close(upsampler(x, size), plain + branch, rtol=1e-4, atol=1e-5)
        seen = direct(wrapped, "conv2d")
        assert isinstance(seen, Adapted)
        torch.testing.assert_close(seen(large), plain + branch, rtol=1e-4, atol=1e-5)
    x.requires_grad_()
    upsampler(x, size).square().sum().backward()
    assert x.grad.isfinite().all()
    assert wrapped.lora_A["one"].weight.grad.norm() > 0


def test_one_layer_with_adapters_is_the_layer_and_the_products():
    """Every way a layer is called, with two adapters of different ranks, strided and without taps too."""
    torch.manual_seed(0)
    norm, group_norm = nn.LayerNorm(32), nn.GroupNorm(8, 32)
    cases = [("linear", 1, 1, 0), ("pointwise", 1, 1, 0), ("conv2d", 3, 1, 1), ("conv2d", 3, 2, 1)]
    for kind, kernel, stride, padding in cases:
        plan = LayerPlan(kind, 32, 64, 8, 8, True, kernel, stride, padding, class_ends=[32])
        layer = IntegerLayer(plan)
        for name, value in layer.named_parameters():
            layer.set_stored(name, torch.randint(-9, 9, value.shape).to(value.dtype))
        layer.set_stored("weight_scale", torch.rand(64) / 100)
        holder = nn.ModuleDict({"layer": layer})
        for r, name in ((3, "a"), (5, "b")):
            config = peft.LoraConfig(r=r, lora_alpha=2, target_modules=["layer"], init_lora_weights=False)
            holder = peft.inject_adapter_in_model(config, holder, name)
        wrapped = holder["layer"]
        wrapped.set_adapter(["a", "b"])
        with torch.no_grad():
            seen = direct(wrapped, kind)
            assert isinstance(seen, Adapted)
            assert direct(wrapped, "linear" if kind != "linear" else "conv2d") is None
            if kind == "linear":
                x, residual = torch.randn(2, 5, 32), torch.randn(2, 5, 64)
                expected = wrapped(norm(x))
                torch.testing.assert_close(seen(x, residual, norm=norm), expected + residual)
                value, gate = expected.chunk(2, -1)
                torch.testing.assert_close(seen.gated(x, norm), value * nn.functional.gelu(gate))
                pixels = torch.randn(2, 32, 3, 4)
                expected = wrapped(group_norm(pixels).permute(0, 2, 3, 1))
                torch.testing.assert_close(seen.over_pixels(pixels, group_norm), expected)
                continue
            x = torch.randn(2, 32, 6, 4)
            expected = wrapped(nn.functional.silu(group_norm(x)))
            residual = torch.randn_like(expected)
            torch.testing.assert_close(seen(x, residual, None, group_norm, "silu"), expected + residual)
            if kind == "pointwise":
                expected = (wrapped(group_norm(x)) + residual).permute(0, 2, 3, 1)
                torch.testing.assert_close(seen.over_pixels(x, group_norm, residual.permute(0, 2, 3, 1)), expected)


@pytest.mark.parametrize("option", ["lora_dropout", "use_dora", "lora_bias"])
def test_adapters_that_are_more_than_two_products_are_called(unet, option):
    add(unet, **{option: 0.5 if option == "lora_dropout" else True})
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    unet.train()
    with torch.no_grad():
        assert direct(layer) is None
        unet.eval()
        assert (direct(layer) is None) == (option != "lora_dropout")
        call(unet)


def test_adapters_in_half_precision(tiny_checkpoint):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_checkpoint, subfolder="unet", dtype=torch.bfloat16)
    add(unet, [*ATTENTION, "proj_in", "conv1", "ff.net.0.proj"])
    got = call(unet, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    whole = UNet2DConditionModel.from_pretrained(tiny_checkpoint, subfolder="unet")
    before = call(whole)
    add(whole, [*ATTENTION, "proj_in", "conv1", "ff.net.0.proj"])
    assert distance(got, call(whole)) < 0.1 < distance(call(whole), before)


def test_files_of_every_format_load_mix_and_come_off(folders, pipe, tmp_path):
    plain = draw(pipe)
    file = lora_files(folders[0], tmp_path / "one", 1, text=True)
    other = lora_files(folders[0], tmp_path / "two", 2)
    state = load_file(file)
    parts = {name.split(".")[0] for name in state}
    assert parts == {"unet", "text_encoder"} | ({"text_encoder_2"} if hasattr(pipe, "text_encoder_2") else set())
    pipe.load_lora_weights(file, adapter_name="one")
    one = draw(pipe)
    assert distance(one, plain) > 0.02
    float_pipe = DiffusionPipeline.from_pretrained(folders[0])
    float_pipe.set_progress_bar_config(disable=True)
    float_plain = draw(float_pipe)
    float_pipe.load_lora_weights(file, adapter_name="one")
    noise, change = distance(plain, float_plain), distance(draw(float_pipe), float_plain)
    assert distance(one, draw(float_pipe)) < max(noise * 1.5, change / 2)

    assert distance(draw(pipe, cross_attention_kwargs={"scale": 0.0}), one) > 0.01
    pipe.load_lora_weights(other, adapter_name="two")
    pipe.set_adapters(["one", "two"], [1.0, 0.5])
    both = draw(pipe)
    assert distance(both, one) > 0.01
    pipe.set_adapters("one", {"unet": {"down": 0.0}})
    assert distance(draw(pipe), one) > 0.01
    pipe.set_adapters("one")
    assert torch.equal(draw(pipe), one)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), plain)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), one)
    pipe.delete_adapters(["one", "two"])
    assert torch.equal(draw(pipe), plain)

    of_unet = {name: value for name, value in state.items() if name.startswith("unet.")}
    kohya = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(of_unet))
    kohya = {name.replace("unet.", "lora_unet_", 1): value for name, value in kohya.items()}
    assert all(name.startswith("lora_unet_") and name.endswith((".weight", ".alpha")) for name in kohya)
    drawn = []
    for number, form in enumerate((of_unet, kohya, {k.replace("lora.down", "lora_A"): v for k, v in of_unet.items()})):
        save_file(form, tmp_path / f"{number}.safetensors")
        pipe.load_lora_weights(tmp_path / f"{number}.safetensors", adapter_name=f"form{number}")
        drawn.append(draw(pipe))
        pipe.unload_lora_weights()
        assert torch.equal(draw(pipe), plain)
    assert distance(drawn[0], plain) > 0.01
    for picture in drawn[1:]:
        assert torch.equal(picture, drawn[0])


def test_loading_an_adapter_packs_nothing_anew(folders, pipe, tmp_path):
    draw(pipe)
    packed = {name: one._prepared for name, one in pipe.unet.named_modules() if isinstance(one, IntegerLayer)}
    pipe.load_lora_weights(lora_files(folders[0], tmp_path / "one", 1), adapter_name="one")
    draw(pipe)
    pipe.unload_lora_weights()
    after = {name: one._prepared for name, one in pipe.unet.named_modules() if isinstance(one, IntegerLayer)}
    assert after == packed
    assert all(packed.values())


def added(unet):
    """What an adapter "x" adds to each weight, by the layer's name."""
    layers = {name: module for name, module in unet.named_modules() if "x" in getattr(module, "lora_A", ())}
    halves = {name: [half["x"].weight.flatten(1) for half in (one.lora_B, one.lora_A)] for name, one in layers.items()}
    return {name: layers[name].scaling["x"] * up @ down for name, (up, down) in halves.items()}


def test_hot_swap(folders, pipe, tmp_path):
    first, second = (lora_files(folders[0], tmp_path / str(r), r, r=r) for r in (2, 6))
    pipe.load_lora_weights(second, adapter_name="x")
    expected, weights = draw(pipe), added(pipe.unet)
    pipe.unload_lora_weights()
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(first, adapter_name="x")
    before, others = draw(pipe), added(pipe.unet)
    pipe.load_lora_weights(second, adapter_name="x", hotswap=True)
    swapped = added(pipe.unet)
    assert swapped.keys() == weights.keys() == others.keys() != set()
    for name, weight in weights.items():
        assert distance(swapped[name], weight) < 1e-5 < distance(others[name], weight)
    # products of 8 rows and of 6 add in another order; a code that turns over for it changes a picture by a hundredth
    assert distance(draw(pipe), expected) < distance(before, expected) / 2


def kohya(pipe, xl):
    """A LoRA of every layer and every text encoder in the names and the dtype that kohya's scripts write."""
    modules = {}
    for name, module in pipe.unet.named_modules():
        original = original_names.unet_module(name, True) if xl and isinstance(module, nn.Linear | nn.Conv2d) else name
        modules[f"lora_unet_{original}"] = module
    for prefix, part in {"lora_te1_" if xl else "lora_te_": "text_encoder", "lora_te2_": "text_encoder_2"}.items():
        for name, module in getattr(pipe, part, nn.Identity()).named_modules():
            if name.endswith(("_proj", "fc1", "fc2")):
                modules[f"{prefix}text_model.{name.removeprefix('text_model.')}"] = module
    state, generator = {}, torch.Generator().manual_seed(0)
    for name, module in modules.items():
        if isinstance(module, nn.Linear | nn.Conv2d):
            n, *rest = module.weight.shape
            halves = {"down": (4, *rest), "up": (n, 4, *(1 for _ in rest[1:]))}
            for half, shape in halves.items():
                value = torch.randn(shape, generator=generator) * 0.3 / math.prod(shape[1:]) ** 0.5
                state[f"{name.replace('.', '_')}.lora_{half}.weight"] = value.half()
            state[f"{name.replace('.', '_')}.alpha"] = torch.tensor(3.0)
    return state


def test_kohyas_files_reach_every_layer(folders, pipe, tmp_path):
    """Names of the original code where SDXL is concerned, text encoders, convolutions, alpha."""
    float_pipe = DiffusionPipeline.from_pretrained(folders[0])
    float_pipe.set_progress_bar_config(disable=True)
    state = kohya(float_pipe, hasattr(pipe, "text_encoder_2"))
    save_file(state, tmp_path / "kohya.safetensors")
    plain = draw(pipe)
    distances = []
    for one in (pipe, float_pipe):
        one.load_lora_weights(tmp_path / "kohya.safetensors", adapter_name="kohya")
        parts = [getattr(one, name, nn.Identity()) for name in ("unet", "text_encoder", "text_encoder_2")]
        wrapped = [module for part in parts for module in part.modules() if isinstance(module, LoraLayer)]
        assert len(wrapped) == len(state) / 3
        assert {module.scaling["kohya"] for module in wrapped} == {3 / 4}
        distances.append(draw(one))
    assert distance(distances[0], distances[1]) < distance(plain, distances[1]) / 1.5
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)


def test_loras_of_flux(tmp_path):
    """Its loader looks into the state_dict for weights, which layers of 4 bits and split ones do not store."""
    folder = tiny_transformers.flux(tmp_path / "flux")
    network = FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=dgq.DgqConfig(wbits=4)
    )
    pipe = DiffusionPipeline.from_pretrained(folder, transformer=network)
    float_pipe = DiffusionPipeline.from_pretrained(folder)
    for one in (pipe, float_pipe):
        one.set_progress_bar_config(disable=True)
    linear = [
        [name for name, module in one.transformer.named_modules() if isinstance(module, nn.Linear)]
        for one in (pipe, float_pipe)
    ]
    assert linear[0] == linear[1]  # a split layer is one
    state, generator = {}, torch.Generator().manual_seed(0)
    for name, module in float_pipe.transformer.named_modules():
        if isinstance(module, nn.Linear):
            state[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator) * 0.1
            state[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator) * 0.1
    save_file(state, tmp_path / "lora.safetensors")
    plain = draw(pipe)
    drawn = []
    for one in (pipe, float_pipe):
        for name in ("one", "other"):
            one.load_lora_weights(tmp_path / "lora.safetensors", adapter_name=name)
        one.set_adapters(["one", "other"], [0.5, 0.25])
        drawn.append(draw(one))
    assert sum(isinstance(module, LoraLayer) for module in pipe.transformer.modules()) == len(state) / 2
    assert distance(drawn[0], drawn[1]) < distance(plain, drawn[1]) / 3
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)


def test_files_of_adapters_are_saved_and_loaded_without_making_a_packed_weight(unet, tmp_path, monkeypatch):
    add(unet)
    expected = call(unet)
    with monkeypatch.context() as patched:
        patched.setattr(native.Layer, "weight", None)
        unet.save_lora_adapter(tmp_path, adapter_name="one")
        unet.unload_lora()
        unet.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"), prefix=None)
    assert torch.equal(call(unet), expected)
    assert not any(isinstance(value, StoredWeight) for value in unet.state_dict().values())


def test_a_state_dict_answers_for_weights_and_is_a_plain_one_in_a_file(unet, tmp_path):
    state = unet.state_dict()
    name = next(name for name, module in unet.named_modules() if isinstance(module, IntegerLayer))
    layer = unet.get_submodule(name)
    assert f"{name}.packed" in state
    assert f"{name}.weight" not in state
    assert state[f"{name}.weight"].shape == layer.dequantize().shape
    add(unet)
    assert unet.state_dict()[f"{name}.weight"].shape == layer.dequantize().shape
    for missing in (f"{name}.none", "none.weight", f"{name.rpartition('.')[0]}.weight"):
        with pytest.raises(KeyError, match=missing):
            state[missing]
    torch.save(state, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert type(read) is OrderedDict
    assert read._metadata == state._metadata
    assert read.keys() == state.keys() == state.copy().keys()


def test_fusing_is_refused_in_a_line_and_changes_nothing(folders, pipe, tmp_path):
    """Of layers that stay float too, which come before the first quantized one."""
    file = lora_files(folders[0], tmp_path / "one", 1, text=True, targets=("conv_in", "linear_1", *ATTENTION))
    pipe.load_lora_weights(file, adapter_name="one")
    before = draw(pipe)
    with pytest.raises(DgqError, match="cannot be fused into packed weights"):
        pipe.fuse_lora()
    assert torch.equal(draw(pipe), before)
    pipe.unload_lora_weights()
    weight = pipe.unet.conv_in.weight.detach().clone()
    pipe.load_lora_weights(lora_files(folders[0], tmp_path / "two", 1, targets=("conv_in",)), adapter_name="two")
    wrapped = pipe.unet.conv_in
    pipe.fuse_lora()
    torch.testing.assert_close(wrapped.base_layer.weight, weight + wrapped.get_delta_weight("two"))


@torch.no_grad()
def test_dora_files_do_what_they_do_to_the_float_weight(folders, pipe, tmp_path):
    """Magnitudes are those of the float weight's rows, which peft asks the layer for."""
    file = lora_files(folders[0], tmp_path / "dora", 1, targets=[*ATTENTION, "ff.net.2"], use_dora=True)
    assert any("magnitude" in name for name in load_file(file))
    pipe.load_lora_weights(file, adapter_name="dora")
    adapted = [layer for layer in pipe.unet.modules() if getattr(layer, "lora_magnitude_vector", None)]
    assert adapted
    for layer in adapted:
        base, magnitude = layer.get_base_layer(), layer.lora_magnitude_vector["dora"].weight.flatten()
        weight = (base.dequantize() + layer.get_delta_weight("dora")).flatten(1)
        weight = weight * (magnitude / weight.norm(dim=1))[:, None]
        x = torch.randn(2, 5, base.in_features)
        expected = nn.functional.linear(x, weight, base.bias)
        assert distance(layer(x), expected) < 0.1


@pytest.mark.parametrize("kind", ["ia3", "vera", "loha", "lokr", "oft"])
def test_other_tuners_of_peft(unet, kind):
    plain = call(unet)
    targets = ["to_k", "to_v", "ff.net.2"]
    config = {
        "ia3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=["ff.net.2"], init_ia3_weights=False),
        "vera": lambda: peft.VeraConfig(r=4, target_modules=["to_k", "to_v"], init_weights=False),
        "loha": lambda: peft.LoHaConfig(r=4, target_modules=[*targets, "conv1", "conv_shortcut"], init_weights=False),
        "lokr": lambda: peft.LoKrConfig(r=4, target_modules=[*targets, "conv1", "conv_shortcut"], init_weights=False),
        "oft": lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=["to_q"], init_weights=False),
    }[kind]()
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    torch.manual_seed(0)
    model = peft.get_peft_model(unet, config)
    changed = call(model)
    assert distance(changed, plain) > 0.02
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 24, 32)
    model(x, torch.tensor(5), text).sample.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
    again = model.unload()
    assert torch.equal(call(again), plain)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_tuners_that_change_the_weight_are_refused_in_a_line(unet):
    call(unet)
    unet.add_adapter(peft.HRAConfig(r=4, target_modules=["to_q"], init_weights=False), "hra")
    with pytest.raises(DgqError, match="has integers, not the float values"):
        call(unet)
    layer = next(module for module in unet.modules() if isinstance(module, IntegerLayer))
    with pytest.raises(DgqError, match="has integers, not the float values"):  # as peft's DoRA of convolutions has it
        layer.weight + torch.ones(layer.weight.shape)
    with pytest.raises(DgqError, match="a packed weight cannot be changed"):
        layer.weight = torch.zeros_like(layer.weight)


def losses(unet, steps, checkpointing=False):
    """Of a LoRA that learns one picture; the gradients of the first step."""
    torch.manual_seed(0)
    unet.requires_grad_(False)
    add(unet, lora_alpha=8, init_lora_weights="gaussian")
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 24, 32, generator=generator)
    seen, first = [], {}
    for _ in range(steps):
        loss = (unet(x, torch.tensor(500), text).sample - target / 10).square().mean()
        loss.backward()
        first = first or {name: parameter.grad.clone() for name, parameter in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(loss.detach()))
    return seen, first


def test_a_lora_learns_through_the_frozen_layers(tiny_checkpoint, unet):
    assert unet.hf_quantizer.is_trainable
    seen, gradients = losses(unet, 8)
    assert seen[-1] < seen[0] * 0.7
    again = dgq.load(tiny_checkpoint, device="cpu").unet
    _, checkpointed = losses(again, 1, checkpointing=True)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
    assert all(float(gradient.norm()) > 0 for name, gradient in gradients.items() if "lora_B" in name)


def test_what_never_learns_says_so(unet):
    """Biases of quantized layers, which peft trains on request."""
    unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_out.0"], bias="lora_only"), "one")
    call(unet)
    with pytest.raises(DgqError, match="the bias of a packed layer takes no gradient"):
        unet(torch.zeros(1, 4, 8, 8), torch.tensor(500), torch.zeros(1, 24, 32))


def test_training_under_autocast(unet):
    """As diffusers' own scripts do with fp16."""
    unet.requires_grad_(False)
    add(unet)
    with torch.autocast("cpu", torch.bfloat16):
        unet(torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 24, 32)).sample.norm().backward()
    assert all(float(p.grad.norm()) > 0 for n, p in unet.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("targets", TARGETS)
def test_drawing_under_autocast(unet, targets, dtype):
    """As diffusers' own scripts do between steps of training, to look at what was learned."""
    add(unet, TARGETS[targets])
    plain = call(unet)
    with torch.autocast("cpu", dtype):
        assert distance(call(unet), plain) < 0.1


@pytest.mark.parametrize("upcast", [False, True])
def test_a_trained_lora_is_saved_and_serves_the_float_model(tiny_pipeline, tiny_checkpoint, unet, tmp_path, upcast):
    from diffusers import UNet2DConditionModel

    losses(unet, 2)
    unet.eval()
    unet.save_lora_adapter(tmp_path, adapter_name="one", upcast_before_saving=upcast)
    (file,) = tmp_path.glob("*.safetensors")
    assert not any("packed" in name or "base_layer" in name for name in load_file(file))
    again = dgq.load(tiny_checkpoint, device="cpu").unet
    plain = call(again)
    for model in (again, UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")):
        before = call(model)
        model.load_lora_adapter(tmp_path, prefix=None, weight_name=file.name)
        assert distance(call(model), before) > 0.01
    assert torch.equal(call(again), call(unet))
    assert json.loads((tiny_checkpoint / "unet" / "config.json").read_text())["quantization_config"]
    again.unload_lora()
    assert torch.equal(call(again), plain)


def test_adapters_and_their_gradients_on_a_device_are_the_cpus(tiny_checkpoint, monkeypatch):
    """On a pretended one: joined products with adapters beside them, the kernels' stored weights on the way back."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def results(device):
        unet = dgq.load(tiny_checkpoint, device=device, dtype=torch.float32).unet.requires_grad_(False)
        place = next(unet.parameters()).device
        prepare_all(unet, place)
        add(unet, [*ATTENTION, "proj_in", "ff.net.2", "conv1", "conv_shortcut"])
        x, text = torch.randn(1, 4, 8, 8).to(place), torch.randn(1, 24, 32).to(place)
        with torch.no_grad():
            y = unet(x, torch.tensor(700), text).sample.cpu()
        unet(x, torch.tensor(700), text).sample.square().mean().backward()
        return y, {name: one.grad.cpu() for name, one in unet.named_parameters() if one.requires_grad}

    expected, gradients = results("cpu")
    with Pretended() as mode:
        got, found = results("cuda")
    assert distance(got, expected) < 0.05
    for name, gradient in gradients.items():
        assert distance(found[name], gradient) < 0.2, name  # single codes move: where, depends on the CPU's products
    together = [torch.cat([each[name].flatten() for name in gradients]) for each in (found, gradients)]
    assert distance(*together) < 0.1
    assert "linear_int4" in {op.__name__.split(".")[0] for op, _ in mode.ran if op.namespace == "dgq"}


@torch.no_grad()
def test_a_block_with_adapters_compiles_without_a_break(unet):
    add(unet)
    unet.eval()
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    x, text = torch.randn(2, 16, block.norm1.weight.shape[0]), torch.randn(2, 24, 32)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = block(x, encoder_hidden_states=text)
    torch.testing.assert_close(compiled(x, encoder_hidden_states=text), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        other = torch.randn_like(x)
        torch.testing.assert_close(
            compiled(other, encoder_hidden_states=text), block(other, encoder_hidden_states=text)
        )
