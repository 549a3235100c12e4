"""The VAE, quantized beside the network: calibrated, stored, loaded by every route, and refused where it is
damaged."""

import copy
import json
import shutil
import weakref

import damage
import pytest
import tiny_pipelines
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import load_file

import dgq
from dgq.calibration.estimate import estimate
from dgq.calibration.run import Options, calibrate
from dgq.checkpoint.diffusers import DgqConfig
from dgq.checkpoint.reading import decoder_header
from dgq.checkpoint.writing import WEIGHTS_NAME
from dgq.errors import DgqError
from dgq.families.autoencoder_kl import FoldedFloatUpsample, LeanDecoder
from dgq.inspection.inspect import inspect
from dgq.integer.fused_unet import FusedResnetBlock
from dgq.integer.layer import IntegerLayer
from dgq.pictures.pipelines import find_model
from dgq.recipe import Recipe
from dgq_kernels import native

UPSAMPLER = "decoder.up_blocks.0.upsamplers.0.conv"
QUICK = Recipe(rounding="nearest", channels="none")
FAST = {"prompts": ["a cat", "a dog"], "steps": 2, "evaluate": 0}
ROUTES = {
    "dgq.load": lambda folder: dgq.load(folder, device="cpu").vae,
    "pipeline": lambda folder: DiffusionPipeline.from_pretrained(folder, safety_checker=None).vae,
    "alone": lambda folder: AutoencoderKL.from_pretrained(folder / "vae"),
}


def latents(batch=2, side=8):
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def decoded(vae, z):
    return vae.decode(z).sample


def sqnr_db(reference, result):
    return 10 * float(torch.log10(reference.square().sum() / (reference - result).square().sum()))


def layers(network):
    return [name for name, module in network.named_modules() if isinstance(module, IntegerLayer)]


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def test_every_route_loads_the_decoder_that_was_calibrated(tiny_checkpoint, tiny_pipeline):
    plain = AutoencoderKL.from_pretrained(tiny_pipeline / "vae")
    results = []
    for load in ROUTES.values():
        vae = load(tiny_checkpoint)
        assert layers(vae)
        assert not any("quant_conv" in name for name in layers(vae))
        assert {"decoder.mid_block.attentions.0.to_q", "decoder.up_blocks.1.resnets.0.conv1"} <= {*layers(vae)}
        assert {"encoder.mid_block.attentions.0.to_q", "encoder.down_blocks.0.downsamplers.0.conv"} <= {*layers(vae)}
        assert not any("shortcut" in name for name in layers(vae))
        assert vae.get_submodule(UPSAMPLER).plan.upsampled
        ends = (half.get_submodule(name) for half in (vae.encoder, vae.decoder) for name in ("conv_in", "conv_out"))
        assert {type(end) for end in ends} == {torch.nn.Conv2d}
        results.append(decoded(vae, latents()))
    assert all(torch.equal(results[0], other) for other in results)
    assert 25 < sqnr_db(decoded(plain, latents()), results[0]) < 60
    picture = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        encoded, own = vae.encode(picture).latent_dist.mean, plain.encode(picture).latent_dist.mean
    assert 25 < sqnr_db(own, encoded) < 60


def test_its_header_and_report(tiny_checkpoint, tiny_pipeline):
    header = decoder_header(tiny_checkpoint)
    assert header.recipe == Recipe(wbits=8, attention="float")
    assert {plan.wbits for plan in header.layers.values()} == {8}
    assert header.calibration["calls"] == 2
    assert header.calibration["sqnr_db"].keys() == header.layers.keys()
    assert header.calibration["fidelity"]["psnr_db"] > 25
    stored = json.loads((tiny_checkpoint / "vae" / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == 3
    network = json.loads((tiny_checkpoint / "unet" / "config.json").read_text())["quantization_config"]
    assert network["format_version"] == 3  # its own upsamplers are folded, too
    report = inspect(tiny_checkpoint).decoder
    assert [layer.name for layer in report.layers] == list(header.layers)
    assert report.bytes == (tiny_checkpoint / "vae" / WEIGHTS_NAME).stat().st_size
    assert f"integer W8A8, {len(header.layers)} layers" in (tiny_checkpoint / "README.md").read_text()
    predicted = estimate(tiny_pipeline, Recipe(), Options(**FAST))
    assert predicted.decoder_layers == len(report.layers)
    assert predicted.decoder_float16_bytes == report.float16_bytes
    assert 0.9 < predicted.decoder_packed_bytes / report.bytes < 1.02  # the file's own header is not counted


def test_blocks_leave_norm_and_residual_to_their_layers(tiny_checkpoint):
    vae = ROUTES["dgq.load"](tiny_checkpoint)
    blocks = [module for module in vae.modules() if isinstance(module, ResnetBlock2D)]
    assert {type(block) for block in blocks} == {FusedResnetBlock}
    plain = copy.deepcopy(vae)
    for module in plain.modules():
        if type(module) is FusedResnetBlock:
            module.__class__ = ResnetBlock2D
    # codes may fall to the other side where the norms round otherwise
    assert sqnr_db(decoded(plain, latents()), decoded(vae, latents())) > 33
    pictures = torch.rand(2, 3, 18, 15)
    with torch.no_grad():
        own, encoded = (one.encode(pictures).latent_dist.mean for one in (plain, vae))
    assert sqnr_db(own, encoded) > 33


def test_an_upsampler_has_inputs_of_16_bits(tiny_checkpoint, tiny_pipeline, monkeypatch):
    vae, plain = ROUTES["dgq.load"](tiny_checkpoint), AutoencoderKL.from_pretrained(tiny_pipeline / "vae")
    layer, module = vae.get_submodule(UPSAMPLER), plain.get_submodule(UPSAMPLER.removesuffix(".conv"))
    upsampler = vae.get_submodule(UPSAMPLER.removesuffix(".conv"))
    assert type(upsampler) is FoldedFloatUpsample
    x = torch.randn(2, layer.in_features, 5, 7)
    with torch.no_grad():
        expected, result = module(x), upsampler(x)
        assert sqnr_db(expected, result) > 40  # weights have 8 bits
        # those that the integers stand for: what is left is the rounding of the input
        weight, scale = layer.integer_weight().double(), layer.weight_scale.double()
        taps = (weight * scale[:, None]).view(-1, 2, 2, layer.in_features).permute(0, 3, 1, 2)
        wide = torch.nn.functional.conv2d(x.double(), taps, layer.bias.double(), padding=1).chunk(4, 1)
        assert sqnr_db(wide[3][:, :, 1:, 1:], result[:, :, 1::2, 1::2]) > 85
        monkeypatch.setenv("DGQ_BACKEND", "reference")
        layer.restore()
        assert torch.equal(upsampler(x), result)
    x.requires_grad_()
    upsampler(x).backward(result)
    theirs = x.detach().clone().requires_grad_()
    module(theirs).backward(result)
    assert sqnr_db(theirs.grad, x.grad) > 40


def test_a_float_upsampler_folds_its_taps(tmp_path):
    torch.manual_seed(0)
    tiny_pipelines.vae().save_pretrained(tmp_path)
    asked = DgqConfig(wbits=8, modules_to_not_convert=["upsamplers"])
    vae = AutoencoderKL.from_pretrained(tmp_path, quantization_config=asked)
    assert not any("upsamplers" in name for name in layers(vae))
    (found,) = [module for module in vae.modules() if isinstance(module, Upsample2D)]
    assert type(found) is FoldedFloatUpsample
    x = torch.randn(2, found.channels, 5, 7)
    plain = copy.deepcopy(found)
    plain.__class__ = Upsample2D
    with torch.no_grad():
        torch.testing.assert_close(found(x), plain(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found(x, output_size=(9, 11)), plain(x, output_size=(9, 11)))
        seen = []
        found.conv.register_forward_pre_hook(lambda *_: seen.append(1))  # as offloading has one
        torch.testing.assert_close(found(x), plain(x))
    assert seen


def test_the_float_decoder_is_copied_as_it_is(tiny_pipeline, tmp_path):
    for recipe, vae in ((QUICK, "float"), (Recipe("paper", groups=1), None)):
        out = tmp_path / recipe.name
        options = Options(**FAST, vae=vae)
        calibrate(tiny_pipeline, out, recipe, options)
        for file in (tiny_pipeline / "vae").iterdir():
            assert (out / "vae" / file.name).read_bytes() == file.read_bytes()
        assert decoder_header(out) is None
        assert inspect(out).decoder is None
        assert estimate(tiny_pipeline, recipe, options).decoder_layers == 0


def test_a_vae_of_another_class_stays_float_unless_it_is_asked_for(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "model")
    file = folder / "vae" / "config.json"
    file.write_text(file.read_text().replace('"AutoencoderKL"', '"AutoencoderTiny"'))
    from dgq.calibration.run import decoder_recipe

    assert decoder_recipe(find_model(folder), Recipe(), Options()) is None
    with pytest.raises(DgqError, match="AutoencoderTiny cannot be quantized"):
        calibrate(folder, tmp_path / "out", Recipe(), Options(**FAST, vae="int8"))
    assert not (tmp_path / "out").exists()


def test_interrupted_and_resumed_gives_the_same_file(tiny_pipeline, tmp_path):
    calibrate(tiny_pipeline, tmp_path / "whole", QUICK, Options(**FAST))

    def interrupt(stage, done, total, detail):
        if stage == "quantize" and "decoder" in detail and done == total // 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_pipeline, out, QUICK, Options(**FAST), interrupt)
    with pytest.raises(DgqError, match="other settings"):
        calibrate(tiny_pipeline, out, QUICK, Options(**FAST, resume=True, vae="float"))
    told = []
    calibrate(tiny_pipeline, out, QUICK, Options(**FAST, resume=True), lambda stage, *rest: told.append((stage, rest)))
    assert "record" not in {stage for stage, _ in told}
    quantized = [rest[2] for stage, rest in told if stage == "quantize"]
    assert quantized
    assert all(detail.startswith(("decoder.", "encoder.")) for detail in quantized)
    a, b = (load_file(place / "vae" / WEIGHTS_NAME) for place in (tmp_path / "whole", out))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_lost_latents_are_recorded_again(tiny_pipeline, tmp_path):
    def interrupt(stage, done, total, detail):
        if stage == "quantize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_pipeline, tmp_path / "out", QUICK, Options(**FAST), interrupt)
    file = tmp_path / ".out.partial" / "calls-vae.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    stages = []
    calibrate(tiny_pipeline, tmp_path / "out", QUICK, Options(**FAST, resume=True), lambda s, *_: stages.append(s))
    assert {"resume", "record"} <= {*stages}


def test_tiles_and_slices(tiny_checkpoint, tiny_pipeline):
    quantized, plain = ROUTES["dgq.load"](tiny_checkpoint), AutoencoderKL.from_pretrained(tiny_pipeline / "vae")
    z = latents(side=16)
    for vae in (quantized, plain):
        vae.enable_tiling()
        vae.enable_slicing()
    assert sqnr_db(decoded(plain, z), decoded(quantized, z)) > 25
    quantized.disable_tiling()
    assert torch.equal(decoded(quantized, z), torch.cat([decoded(quantized, part) for part in z.split(1)]))


def test_it_is_cast_as_pipelines_do(tiny_checkpoint):
    vae = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae", dtype=torch.float16)
    assert vae.dtype == torch.float16
    scales = {name: value for name, value in vae.state_dict().items() if name.endswith("weight_scale")}
    vae.to(dtype=torch.float32)  # where its class asks for that
    assert vae.dtype == next(vae.post_quant_conv.parameters()).dtype == torch.float32
    after = vae.state_dict()
    assert all(value.dtype == torch.float32 and torch.equal(value, after[name]) for name, value in scales.items())
    assert sqnr_db(decoded(ROUTES["alone"](tiny_checkpoint), latents()), decoded(vae, latents())) > 40


def test_on_the_fly_and_back(tmp_path):
    torch.manual_seed(0)
    plain = tiny_pipelines.vae().eval()
    plain.save_pretrained(tmp_path / "float")
    asked = DgqConfig(wbits=8, channels="rotate")
    vae = AutoencoderKL.from_pretrained(tmp_path / "float", quantization_config=asked)
    result = decoded(vae, latents())
    assert 25 < sqnr_db(decoded(plain, latents()), result) < 60
    vae.save_pretrained(tmp_path / "packed")
    assert torch.equal(decoded(AutoencoderKL.from_pretrained(tmp_path / "packed"), latents()), result)
    vae.dequantize()
    assert not layers(vae)
    reference = decoded(plain, latents())
    assert sqnr_db(reference, decoded(vae, latents())) > sqnr_db(reference, result) + 1  # inputs are not rounded


def edit_config(folder, change):
    damage.edit_config(folder / "vae", change)


def edit_tensors(folder, change):
    damage.edit_tensors(folder / "vae" / WEIGHTS_NAME, change)


FIRST = "decoder.mid_block.resnets.0.conv1"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: edit_config(f, lambda q: q.update(more=1)), "unknown field 'more'"),
        (
            lambda f: edit_config(f, lambda q: q["layers"].update({"encoder.conv_in": q["layers"][FIRST]})),
            "'encoder.conv_in' cannot be quantized",
        ),
        (lambda f: edit_config(f, lambda q: q["layers"][FIRST].update(stride=2)), f"{FIRST}.*stride is 2"),
        (
            lambda f: edit_config(f, lambda q: q["layers"][UPSAMPLER].update(upsampled=False, abits=8)),
            f"{UPSAMPLER}.*(kernel_size|out_features) is",
        ),
        (lambda f: edit_config(f, lambda q: q["layers"][UPSAMPLER].update(abits=9)), f"{UPSAMPLER}.*abits 9"),
        (lambda f: edit_config(f, lambda q: q["layers"][FIRST].update(abits=16)), f"{FIRST}.*abits 16"),
        (lambda f: edit_config(f, lambda q: q["layers"][UPSAMPLER].update(rotation=16)), f"{UPSAMPLER}.*no such layer"),
        (lambda f: edit_config(f, lambda q: q.update(format_version=2)), "version 2 has no layers that upsample"),
        (lambda f: edit_tensors(f, lambda t: t.pop(f"{FIRST}.weight_scale")), f"{FIRST}.weight_scale' is missing"),
        (lambda f: edit_tensors(f, lambda t: t[f"{FIRST}.weight_scale"].zero_()), "a scale that is not positive"),
        (lambda f: (f / "vae" / WEIGHTS_NAME).write_bytes(b"1234567890"), "safetensors|deserializ|header"),
    ],
)
def test_a_damaged_decoder_is_named(folder, monkeypatch, route, change, message):
    monkeypatch.setenv("DGQ_VERIFY", "0")
    change(folder)
    expected = Exception if route != "dgq.load" and "header" in message else DgqError
    with pytest.raises(expected, match=message):
        ROUTES[route](folder)


@pytest.mark.parametrize("route", ROUTES)
def test_one_bit_of_a_weight(folder, route):
    file = folder / "vae" / WEIGHTS_NAME
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DgqError, match=r"vae.diffusion_pytorch_model.safetensors: is not as it was written"):
        ROUTES[route](folder)


def test_a_decode_begins_by_returning_what_was_freed(tiny_checkpoint, monkeypatch):
    vae = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae")
    assert type(vae.decoder) is LeanDecoder
    order = []
    monkeypatch.setattr("dgq.families.autoencoder_kl.native.give_back", lambda: order.append("returned"))
    vae.decoder.conv_in.register_forward_pre_hook(lambda *_: order.append("decoded"))
    decoded(vae, latents())
    assert order == ["returned", "decoded", "returned"]  # and after its upsampler once more
    assert type(vae.dequantize().decoder) is Decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_lean_decode_is_a_plain_one(tiny_checkpoint, dtype):
    vae = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae", torch_dtype=dtype)
    z = latents().to(dtype)
    calls = []
    with torch.no_grad():
        plain = Decoder.forward(vae.decoder, vae.post_quant_conv(z))
        vae.decoder.conv_out.register_forward_pre_hook(lambda *_: calls.append("last"))
        lean = decoded(vae, z)
        norm = vae.decoder.conv_norm_out.register_forward_pre_hook(lambda *_: calls.append("norm"))
        hooked = decoded(vae, z)
        norm.remove()
        vae.decoder.up_blocks[0].register_forward_hook(lambda *_: calls.append("block"))
        assert torch.equal(decoded(vae, z), lean)
        vae.decoder.conv_act = torch.nn.ReLU()
        other = Decoder.forward(vae.decoder, vae.post_quant_conv(z))
        assert torch.equal(decoded(vae, z), other)
    assert torch.equal(hooked, plain)
    assert sqnr_db(plain.float(), lean.float()) > (80 if dtype == torch.float32 else 40)
    assert calls == ["last", "norm", "last", "block", "last", *["block", "last"] * 2]


def test_the_reference_decodes_plainly(tiny_checkpoint, monkeypatch):
    vae = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae")
    monkeypatch.setenv("DGQ_BACKEND", "reference")
    with torch.no_grad():
        plain = Decoder.forward(vae.decoder, vae.post_quant_conv(latents()))
        monkeypatch.setattr(native.Norm, "over_groups", None)
        assert torch.equal(decoded(vae, latents()), plain)


def test_a_decode_with_gradients_is_a_plain_one(tiny_checkpoint):
    vae = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae")
    z = latents().requires_grad_()
    vae.decode(z).sample.square().sum().backward()
    with torch.no_grad():
        assert sqnr_db(decoded(vae, z), vae.decode(z.detach()).sample) == float("inf")
    assert bool(z.grad.abs().sum() > 0)


def test_large_pictures_of_a_decode_take_each_others_place(tiny_checkpoint, monkeypatch):
    vae = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae")
    expected, known = decoded(vae, latents()), []
    block = native.memory._block

    def noted(blocks, size):
        before = [weakref.ref(one) for one in blocks]
        given = block(blocks, size)
        known.append(any(one() is given for one in before))
        return given

    monkeypatch.setattr(native.memory, "_LARGE", 0)
    monkeypatch.setattr(native.memory, "_block", noted)
    assert torch.equal(decoded(vae, latents()), expected)
    assert set(known) == {False, True}


def test_a_block_of_a_decode_holds_no_picture_longer_than_it_is_read(tiny_checkpoint, monkeypatch):
    vae = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae")
    expected, made, calls = decoded(vae, latents()), [], []
    convolve, upsample = native.Layer.conv2d, native.Layer.upsample

    def convolved(layer, x, residual=None, *args):
        alive = [picture() is not None for picture in made]
        y = convolve(layer, x, residual, *args)
        calls.append((place(x), None if residual is None else place(residual), place(y), alive))
        made.append(weakref.ref(y))
        return y

    def upsampled(layer, x):
        y = upsample(layer, x)
        made.append(weakref.ref(y))
        return y

    def place(tensor):
        return tensor.untyped_storage().data_ptr()

    monkeypatch.setattr(native.Layer, "conv2d", convolved)
    monkeypatch.setattr(native.Layer, "upsample", upsampled)
    assert torch.equal(decoded(vae, latents()), expected)
    blocks = [module for module in vae.decoder.modules() if isinstance(module, ResnetBlock2D)]
    order = [*vae.decoder.mid_block.resnets, *(x for block in vae.decoder.up_blocks for x in block.resnets)]
    assert len(order) == len(blocks) == len(calls) / 2
    shortened = [i for i, block in enumerate(order) if block.conv_shortcut is not None]
    assert shortened
    for i in range(2, len(order)):
        (x, _, hidden, _), (_, residual, y, alive) = calls[2 * i : 2 * i + 2]
        assert (residual == y) == (i > 2)  # what the middle block gave may be in other hands
        assert (hidden == x) == (i in shortened)
        assert sum(alive) == (1 if i in shortened else 2)  # the first convolution's result, and the residual


def test_what_hooks_keep_of_a_decode_is_not_written_over(tiny_checkpoint):
    vae = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae")
    expected, kept = decoded(vae, latents()), []

    def keep(module, args, result):
        kept.extend((value, value.clone()) for value in (*args, result) if torch.is_tensor(value))

    parts = [module for module in vae.decoder.modules() if module is not vae.decoder]
    for module in parts:
        kept.clear()
        handle = module.register_forward_hook(keep)
        result = decoded(vae, latents())
        handle.remove()
        assert kept or not isinstance(module, (ResnetBlock2D, Upsample2D, IntegerLayer))
        assert sqnr_db(expected, result) > 33  # blocks whose layers have hooks run as diffusers'
        assert all(torch.equal(value, copy) for value, copy in kept)
    kept.clear()
    with torch.nn.modules.module.register_module_forward_hook(keep):
        decoded(vae, latents())
    assert len(kept) > len(parts)
    assert all(torch.equal(value, copy) for value, copy in kept)


def test_a_decode_under_a_low_rank_adapter_is_a_plain_one(tiny_checkpoint):
    peft = pytest.importorskip("peft")
    vae = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae")
    before = decoded(vae, latents())
    config = peft.LoraConfig(r=2, target_modules=r"decoder\.up_blocks\..*\.conv[12]", init_lora_weights=False)
    peft.inject_adapter_in_model(config, vae)
    vae.eval()
    with torch.no_grad():
        plain = Decoder.forward(vae.decoder, vae.post_quant_conv(latents()))
        lean = decoded(vae, latents())
    assert sqnr_db(plain, lean) > 80
    assert sqnr_db(before, lean) < 60
