"""`DgqConfig(wbits=..., abits=...)`: a float model quantized while diffusers reads it, and turned back."""

import json
import subprocess
import sys

import pytest
import torch
from comparing import assert_close
from safetensors.torch import load_file, save_file
from tiny_pipelines import WIDTH, unet

import dgq
from dgq import DgqConfig
from dgq.errors import DgqError
from dgq.integer.attention import LogAttnProcessor
from dgq.integer.layer import IntegerLayer
from dgq.pictures.generation import Settings, generate
from dgq_kernels import native

KINDS = {"w8": {"wbits": 8}, "w4": {"wbits": 4}, "rotated": {"wbits": 8, "channels": "rotate"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    unet().save_pretrained(folder)
    return folder


def load(folder, **options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, **options)


def call(network):
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, WIDTH, generator=generator)
    with torch.no_grad():
        return network(sample.to(network.dtype), torch.tensor(500), text.to(network.dtype)).sample


def layers(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, IntegerLayer)}


def error(a, b):
    return float((a.detach().float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_model_becomes_a_checkpoint_that_draws_the_same(folder, tmp_path, kind):
    plain, quantized = load(folder), load(folder, quantization_config=DgqConfig(**KINDS[kind]))
    expected = call(quantized)
    assert 0.001 < error(expected, call(plain)) < (0.3 if kind == "w4" else 0.05)
    assert len(layers(quantized)) == 85
    assert all(isinstance(one, LogAttnProcessor) for one in quantized.attn_processors.values())
    assert {bool(one.plan.rotation) for one in layers(quantized).values()} == {kind == "rotated"}
    assert quantized.num_parameters() == plain.num_parameters()
    asked = quantized.hf_quantizer.quantization_config
    quantized.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(call(again), expected)
    assert again.config["quantization_config"] == asked
    assert again.config["quantization_config"] != DgqConfig(**KINDS[kind])


def test_half_precision_files_shards_and_dtypes(folder, tmp_path):
    """The integers are those of the stored weights, whatever dtype the rest is asked in."""
    load(folder).half().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    models = [
        load(tmp_path, quantization_config=DgqConfig(wbits=8), torch_dtype=dtype)
        for dtype in (None, torch.float16, torch.bfloat16)
    ]
    assert [model.dtype for model in models] == [torch.float32, torch.float16, torch.bfloat16]
    for model in models[1:]:
        assert model.conv_in.weight.dtype == model.dtype
        for name, layer in layers(model).items():
            for leaf, value in layer.state_dict().items():
                assert torch.equal(value, models[0].get_submodule(name).state_dict()[leaf])
        assert error(call(model), call(models[0])) < 0.05


def test_shards_cost_no_weight_twice(folder, tmp_path, monkeypatch):
    """diffusers asks for the state dict at every file: no packed weight may be made into its stored form for it."""
    load(folder).save_pretrained(tmp_path, max_shard_size="60KB")
    unpacked = []
    rows = native.Layer.rows
    monkeypatch.setattr(native.Layer, "rows", lambda *args: unpacked.append(1) or rows(*args))
    model = load(tmp_path, quantization_config=DgqConfig(wbits=4))
    assert not unpacked
    model.state_dict()
    assert not native.available() or len(unpacked) == len(layers(model))


LARGE = """
import sys
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from dgq import DgqConfig

class Large(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self):
        super().__init__()
        sizes = [64 * (1 + i % 7) for i in range(70)]
        self.body = torch.nn.ModuleList([torch.nn.Conv2d(a, b, 3) for a, b in zip(sizes, sizes[5:])])

def held(kind):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind)) / 2**10

if sys.argv[2] == "make":
    Large().half().save_pretrained(sys.argv[1])
else:
    before = held("RssAnon")
    model = Large.from_pretrained(sys.argv[1], quantization_config=DgqConfig(wbits=8))
    print(held("RssAnon") - before, model.get_memory_footprint() / 2**20)
"""


@pytest.mark.slow  # other processes move what the allocator holds
def test_no_more_is_held_than_the_packed_model(tmp_path):
    """Of 38 million weights: 72 MiB in the file, 145 in float32, 36 packed; fragments of the heap would add 20."""
    run = [sys.executable, "-c", LARGE, str(tmp_path)]
    subprocess.run([*run, "make"], check=True, capture_output=True)
    result = subprocess.run([*run, "load"], check=True, capture_output=True, text=True)
    held, packed = map(float, result.stdout.split())
    assert 25 < packed < 45
    assert held < packed + 20


def test_what_is_named_stays_float(folder, tmp_path):
    config = DgqConfig(wbits=8, modules_to_not_convert=["attn1", "*.resnets.0.conv1", "time_embedding.linear_1"])
    model = load(folder, quantization_config=config)
    found = layers(model)
    left = [name for name, one in model.named_modules() if type(one) in (torch.nn.Linear, torch.nn.Conv2d)]
    assert "time_embedding.linear_1" in left
    assert "time_embedding.linear_2" in found
    assert any(".attn1.to_out.0" in name for name in left)
    assert not any(".attn1." in name for name in found)
    assert any(name.endswith(".resnets.0.conv1") for name in left)
    assert not any(name.endswith(".resnets.0.conv1") for name in found)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["modules_to_not_convert"] == config.modules_to_not_convert
    torch.testing.assert_close(call(load(tmp_path)), call(model), rtol=1e-4, atol=1e-5)  # in another memory format
    with pytest.raises(DgqError, match="'attn3' matches no module"):
        load(folder, quantization_config=DgqConfig(modules_to_not_convert=["attn3"]))


def test_a_pipeline_by_its_mapping(tiny_pipeline, tmp_path):
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    mapping = PipelineQuantizationConfig(quant_mapping={"unet": DgqConfig(wbits=8, abits=8)})
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline, quantization_config=mapping)
    pipe.set_progress_bar_config(disable=True)
    assert len(layers(pipe.unet)) == 85
    settings = Settings(steps=2, guidance=3.0)
    expected = generate(pipe, ["a cat"], settings)[0].latents
    pipe.save_pretrained(tmp_path / "out")
    again = dgq.load(tmp_path / "out", device="cpu")
    assert torch.equal(generate(again, ["a cat"], settings)[0].latents, expected)


SIMPLE_CROSS = {  # attention to pixels and text at once, the text by layers of its own
    "attention_head_dim": 16,
    "resnet_time_scale_shift": "scale_shift",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "encoder_hid_dim": 16,
}
IF = {"encoder_hid_dim_type": "text_proj", "addition_embed_type": "text", "addition_embed_type_num_heads": 2}
KANDINSKY = {"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}


@pytest.mark.parametrize("kind", [IF, KANDINSKY], ids=["deepfloyd-if", "kandinsky"])
def test_unets_whose_text_has_no_start_token(tmp_path, kind):
    """Their attention is float, and a picture's embedding is not cast to integers."""
    unet(**SIMPLE_CROSS, **kind).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text, picture = torch.randn(2, 7, 16, generator=generator), torch.randn(2, 16, generator=generator)
    given = {"image_embeds": picture} if kind is KANDINSKY else None

    def drawn(network):
        with torch.no_grad():
            return network(sample, torch.tensor(500), text, added_cond_kwargs=given).sample

    quantized = load(tmp_path, quantization_config=DgqConfig(wbits=8))
    expected = drawn(quantized)
    assert_close("output", expected, drawn(load(tmp_path)), 0.05)
    quantized.save_pretrained(tmp_path / "again")
    assert torch.equal(drawn(load(tmp_path / "again")), expected)


def flux(**options):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 4, 8],
        **options,
    )


def flux_call(network):
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden_states": (1, 16, 4), "encoder_hidden_states": (1, 24, WIDTH), "pooled_projections": (1, WIDTH)}
    given = {name: torch.randn(size, generator=generator).to(network.dtype) for name, size in sizes.items()}
    with torch.no_grad():
        return network(**given, img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(24, 3), timestep=torch.ones(1)).sample


def test_a_transformer_has_the_dtype_that_was_asked_for(tmp_path):
    from diffusers import FluxTransformer2DModel

    flux().save_pretrained(tmp_path / "float")
    plain = FluxTransformer2DModel.from_pretrained(tmp_path / "float")
    for dtype in (torch.float32, torch.bfloat16):
        model = FluxTransformer2DModel.from_pretrained(
            tmp_path / "float", quantization_config=DgqConfig(wbits=8), torch_dtype=dtype
        )
        assert model.dtype == dtype
        assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.int8
        assert model.proj_out.weight.dtype == dtype
        assert flux_call(model).dtype == dtype
        assert error(flux_call(model), flux_call(plain)) < 0.05
    model.save_pretrained(tmp_path / "quantized")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "quantized", torch_dtype=torch.bfloat16)
    assert torch.equal(flux_call(again), flux_call(model))


def test_an_unknown_network_keeps_what_diffusers_keeps(tmp_path):
    """By the attributes of its class, and its first and last convolution."""
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

    class Unknown(ModelMixin, ConfigMixin):
        _keep_in_fp32_modules = ["gate"]  # noqa: RUF012
        _skip_layerwise_casting_patterns = ["norm", "^tail$"]  # noqa: RUF012

        @register_to_config
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = (torch.nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))
            self.gate, self.norm_out, self.tail, self.body = (torch.nn.Linear(32, 32) for _ in range(4))

        def forward(self, x):
            rows = self.body(self.gate(self.middle(self.first(x)).flatten(2).transpose(1, 2)))
            return self.last(self.tail(self.norm_out(rows)).transpose(1, 2).view_as(x))

    Unknown().save_pretrained(tmp_path / "float")
    model = Unknown.from_pretrained(
        tmp_path / "float", quantization_config=DgqConfig(wbits=8), torch_dtype=torch.bfloat16
    )
    assert set(layers(model)) == {"middle", "body"}
    assert model.gate.weight.dtype == torch.float32
    assert model.tail.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_it_is_a_float_model_that_draws_nearly_the_same(folder, tmp_path, kind):
    model = load(folder, quantization_config=DgqConfig(**KINDS[kind]))
    expected = call(model)
    model.dequantize()
    assert {type(one) for one in model.modules()} == {type(one) for one in load(folder).modules()}
    assert not any(isinstance(one, LogAttnProcessor) for one in model.attn_processors.values())
    assert error(call(model), expected) < 0.05
    assert "quantization_config" not in model.config
    assert not hasattr(model, "hf_quantizer")
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(call(load(tmp_path)), call(model), rtol=1e-4, atol=1e-5)  # in another memory format
    assert model.half().dtype == torch.float16  # no cast is refused any more


@pytest.mark.parametrize("channels", ["none", "smooth", "shift", "rotate"])
@pytest.mark.parametrize("wbits", [8, 4])
@pytest.mark.parametrize("kind", ["linear", "pointwise", "conv2d"])
def test_a_dequantized_layer_is_the_integer_one_without_rounding(kind, wbits, channels):
    """Divisor, rotation, order and shift classes undone: what remains is the rounding of the input."""
    import dataclasses

    from dgq.integer.channels import form_groups, no_groups
    from dgq.integer.dequantize import float_layer
    from dgq.integer.weights import nearest, quantize_weight
    from dgq.recipe import LayerPlan

    generator = torch.Generator().manual_seed(0)
    rms = torch.ones(64)
    rms[5::9] = 6.0
    groups = (
        form_groups(channels, rms, wbits)
        if channels != "rotate"
        else dataclasses.replace(form_groups("smooth", rms, wbits), rotation=64)
    )
    groups = no_groups(64) if channels == "none" else groups
    plan = LayerPlan(
        kind,
        64,
        48,
        wbits,
        8,
        True,
        kernel_size=3 if kind == "conv2d" else 1,
        padding=int(kind == "conv2d"),
        channels=groups.mode,
        class_ends=groups.class_ends,
        reordered=groups.order is not None,
        rotation=groups.rotation,
    )
    weight = torch.randn(48, 64, *([3, 3] if kind == "conv2d" else []), generator=generator)
    matrix = groups.fold(weight)
    ones = torch.ones(matrix.shape[1])
    layer = IntegerLayer.from_quantized(
        plan, quantize_weight(matrix, wbits, 32, ones, nearest(ones)), groups, torch.randn(48, generator=generator)
    )
    plain = float_layer(layer, torch.float32)
    x = torch.randn(*((3, 7, 64) if kind == "linear" else (2, 64, 6, 6)), generator=generator)
    x = x * (rms if kind == "linear" else rms[:, None, None])
    with torch.no_grad():
        assert_close("output", layer(x), plain(x), 0.02)
    assert error(plain.weight.flatten(1), weight.flatten(1)) < (0.2 if wbits == 4 else 0.02)


def test_configurations_say_what_was_asked_for(folder):
    config = DgqConfig(wbits=8, modules_to_not_convert=["attn1"])
    assert config.to_dict() == {
        "quant_method": "dgq",
        "wbits": 8,
        "abits": 8,
        "channels": "none",
        "attention": "log",
        "weight_group": 32,
        "modules_to_not_convert": ["attn1"],
    }
    assert config.to_diff_dict() == {"quant_method": "dgq", "wbits": 8, "modules_to_not_convert": ["attn1"]}
    assert json.loads(config.to_json_string()) == config.to_diff_dict()
    assert dict(config) == config.to_dict()
    assert repr(config) == "DgqConfig(wbits=8, abits=8, modules_to_not_convert=['attn1'])"
    assert DgqConfig.from_dict(config.to_dict()) == config != DgqConfig(wbits=8)
    model = load(folder, quantization_config=config)
    assert config.header is None  # one configuration serves several models
    own = model.config["quantization_config"]
    assert repr(own).startswith("DgqConfig(integer none nearest W8A8, ")
    assert DgqConfig.from_dict(json.loads(own.to_json_string())) == own
    assert own.to_diff_dict() == own.to_dict()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"wbits": 3}, "DgqConfig: wbits 3 is not one of 4, 8"),
        ({"abits": "8"}, "DgqConfig: abits '8' is not a whole number"),
        ({"bits": 8}, "DgqConfig has no argument 'bits'"),
        ({"channels": "smooth"}, "channels 'smooth' is neither 'none' nor 'rotate'"),
        ({"attention": "int8"}, "attention 'int8' is not one of log, float"),
        ({"modules_to_not_convert": "attn1"}, "modules_to_not_convert 'attn1' is no list of names"),
    ],
)
def test_wrong_arguments_are_one_line(asked, message):
    with pytest.raises(ValueError, match=message) as told:
        DgqConfig(**asked)
    assert "\n" not in str(told.value)


def test_damaged_models_are_refused(folder, tmp_path):
    """A tensor that is missing or not finite, and configurations of the wrong kind of model."""
    quantized = load(folder, quantization_config=DgqConfig(wbits=8))
    header = quantized.config["quantization_config"]
    with pytest.raises(DgqError, match="that of a checkpoint, and the model is a float one"):
        load(folder, quantization_config=header)
    with pytest.raises(DgqError, match="on the disk, where they cannot be quantized"):
        load(folder, quantization_config=DgqConfig(), device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    load(folder).save_pretrained(tmp_path / "damaged")
    file = tmp_path / "damaged" / "diffusion_pytorch_model.safetensors"
    state, name = load_file(file), "mid_block.resnets.0.conv1.weight"
    save_file({key: value for key, value in state.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(DgqError, match=f"tensor '{name}' is missing"):
        load(tmp_path / "damaged", quantization_config=DgqConfig())
    state[name][0, 0, 0, 0] = torch.nan
    save_file(state, file, {"format": "pt"})
    with pytest.raises(DgqError, match=f"tensor '{name}' holds values that are not finite"):
        load(tmp_path / "damaged", quantization_config=DgqConfig())
    config = json.loads((tmp_path / "damaged" / "config.json").read_text())
    config["quantization_config"] = DgqConfig().to_dict()
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DgqError, match="says what was asked for, and not what the weights are"):
        load(tmp_path / "damaged")


def test_a_wrong_shape_in_a_checkpoint_is_a_value_error_that_names_the_key(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DGQ_VERIFY", "0")
    load(folder, quantization_config=DgqConfig(wbits=4)).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = next(key for key, value in state.items() if value.dtype == torch.uint8)
    state[name] = torch.randn(state[name].shape[0] - 1, 1)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=name):
        load(tmp_path)


@pytest.mark.parametrize("place", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(folder, place):
    model = load(folder, quantization_config=DgqConfig(wbits=8), device_map=place)
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    assert torch.equal(call(model), call(load(folder, quantization_config=DgqConfig(wbits=8))))


def test_the_quick_search_is_close_to_the_thorough_one():
    from dgq.integer.on_the_fly import round_to_nearest
    from dgq.integer.weights import nearest, quantize_weight

    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(48, 200, generator=generator)
    for matrix in (normal, normal**3, normal * torch.rand(48, 1, generator=generator) ** 3):
        ones = torch.ones(matrix.shape[1])
        for bits in (8, 4):
            quick = round_to_nearest(matrix, bits, 32)
            thorough = quantize_weight(matrix, bits, 32, ones, nearest(ones))
            assert quick.codes.shape == thorough.codes.shape
            if quick.subscales is not None:
                assert quick.subscales.shape == thorough.subscales.shape
            assert error(quick.dequantize(), matrix) < 1.1 * error(thorough.dequantize(), matrix)
    for bits in (8, 4):
        nothing = round_to_nearest(torch.zeros(3, 40), bits, 32)
        assert not nothing.codes.any()
        assert bool((nothing.scale > 0).all())
