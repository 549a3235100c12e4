"""Integer layers among what diffusers, peft and accelerate do with a model's layers."""

import copy

import pytest
import tiny_transformers
import torch
from comparing import assert_close
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    DiffusionPipeline,
    FluxControlNetModel,
    LayerSkipConfig,
    MotionAdapter,
    PipelineQuantizationConfig,
    SD3ControlNetModel,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.hooks import apply_layer_skip
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from torch import nn

import dgq
from dgq.errors import DgqError
from dgq.integer.attention import AttentionPlan, LogAttnProcessor
from dgq.integer.layer import IntegerConv2d, IntegerLayer, IntegerLinear, is_direct
from dgq.integer.stored import StoredWeight
from dgq.recipe import LayerPlan
from dgq_kernels import native

PLANS = [
    LayerPlan(
        kind,
        32,
        48,
        wbits,
        8,
        True,
        kernel_size=3 if kind == "conv2d" else 1,
        padding=int(kind == "conv2d"),
        class_ends=[32],
    )
    for kind in ("linear", "pointwise", "conv2d")
    for wbits in (8, 4)
]


@pytest.fixture(scope="module")
def tiny_w8_checkpoint(tiny_pipeline, tmp_path_factory):
    from dgq.calibration.run import Options, calibrate
    from dgq.recipe import Recipe

    out = tmp_path_factory.mktemp("checkpoints") / "tiny-w8a8"
    calibrate(
        tiny_pipeline,
        out,
        Recipe(wbits=8, abits=8, rounding="nearest"),
        Options(prompts=["a cat"], steps=2, evaluate=0),
    )
    return out


@pytest.fixture(params=[8, 4])
def unet(request, tiny_checkpoint, tiny_w8_checkpoint):
    return dgq.load(tiny_w8_checkpoint if request.param == 8 else tiny_checkpoint, device="cpu").unet


def call(unet):
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, 32, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor(500), text).sample


def layers(unet):
    return [module for module in unet.modules() if isinstance(module, IntegerLayer)]


def plain_call(unet):
    """The UNet's result where no layer does its neighbours' work: a hook of the user's sits on every one."""
    handles = [layer.register_forward_hook(lambda *_: None) for layer in layers(unet)]
    try:
        return call(unet)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.kind}-w{plan.wbits}")
def test_layers_look_like_the_float_ones(plan):
    layer = IntegerLayer(plan)
    float_layer = nn.Linear(32, 48) if plan.kind == "linear" else nn.Conv2d(32, 48, plan.kernel_size, 1, plan.padding)
    assert isinstance(layer, type(float_layer))
    assert layer.weight.shape == float_layer.weight.shape
    assert layer.weight.dtype == torch.int8
    names = (
        "in_features out_features"
        if plan.kind == "linear"
        else ("in_channels out_channels kernel_size stride padding dilation groups padding_mode transposed")
    )
    for name in names.split():
        assert getattr(layer, name) == getattr(float_layer, name), name
    assert not list(layer.buffers())
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_adapters_that_make_layers_of_the_same_type_get_float_ones():
    layer = IntegerLayer(PLANS[4])
    assert type(type(layer)(32, 4, layer.kernel_size, layer.stride, layer.padding, bias=False)) is nn.Conv2d
    assert type(copy.deepcopy(layer)) is IntegerConv2d
    assert type(IntegerLayer(PLANS[0])) is IntegerLinear


def test_a_packed_weight_stands_for_its_tensor(unet):
    call(unet)
    for layer in layers(unet):
        stored = layer.stored
        if isinstance(stored, StoredWeight):
            assert stored.numel() == stored.make().numel()
            assert torch.equal(stored + 0, stored.make())
            assert stored.to("meta").shape == stored.shape
            with pytest.raises(DgqError, match="cannot be changed in place"):
                stored.zero_()


def test_a_hook_on_a_layer_is_called_and_changes_nothing_else(unet):
    """Fused blocks ask a layer for more than its forward, which would pass a hook by."""
    seen = []
    layer = unet.mid_block.resnets[0].conv1
    assert is_direct(layer)
    handle = layer.register_forward_hook(lambda module, *_: seen.append(module))
    assert not is_direct(layer)
    call(unet)
    handle.remove()
    assert seen == [layer]
    assert torch.equal(plain_call(unet), plain_call(unet))


WORK_DONE_ELSEWHERE = (
    "time_embedding.act",
    *(f"down_blocks.0.resnets.0.{name}" for name in ("norm1", "nonlinearity", "norm2", "dropout")),
    "down_blocks.0.attentions.0.norm",
    *(
        f"down_blocks.0.attentions.0.transformer_blocks.0.{name}"
        for name in ["norm1", "attn1", "attn1.to_out.1", "norm2", "attn2", "norm3", "ff", "ff.net.0", "ff.net.1"]
    ),
)


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_modules_whose_work_layers_do_are_called_where_others_changed_them(unet, how):
    """Norms, activations and dropouts, and modules around attention: as without anything fused, on the whole batch."""
    generator = torch.Generator().manual_seed(0)
    half, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(2, 24, 32, generator=generator)
    sizes = []

    def changed(result):
        sizes.append(len(result))
        return result * 3

    @torch.no_grad()
    def call():  # with equal halves, as guidance has it
        return unet(half.repeat(2, 1, 1, 1), torch.tensor(500), text).sample

    def call_with(module):
        if how == "hook":
            handle = module.register_forward_hook(lambda own, args, result: changed(result))
        else:
            own = module.forward
            module.forward = lambda *args, **kwargs: changed(own(*args, **kwargs))
        result = call()
        if how == "hook":
            handle.remove()
        else:
            del module.forward
        return result

    before = call()
    for name in WORK_DONE_ELSEWHERE:
        module = unet.get_submodule(name)
        result = call_with(module)
        handles = [layer.register_forward_hook(lambda *_: None) for layer in layers(unet)]
        expected = call_with(module)
        for handle in handles:
            handle.remove()
        assert (result - expected).norm() < 0.5 * (result - before).norm(), name
        assert set(sizes) == {2}, name
        sizes.clear()
    assert torch.equal(call(), before)


def test_lora_of_every_layer_is_what_it_is_around_float_layers(unet):
    """y = layer(x) + B A x: of layers that are fused with their neighbours as of all others."""
    import peft

    plain, fused = plain_call(unet), call(unet)
    targets = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "conv1",
        "conv2",
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "time_emb_proj",
        "linear_1",
        "linear_2",
        "conv",
    ]
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False), "one")
    inner = {name: module for name, module in unet.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert {type(module.get_base_layer()) for module in inner.values()} == {IntegerLinear, IntegerConv2d}
    reached = set()
    for name, module in inner.items():

        def check(own, args, result, name=name):
            x, *rest = args
            delta = own.lora_B["one"](own.lora_A["one"](x)) * own.scaling["one"]
            torch.testing.assert_close(result, own.get_base_layer()(x, *rest) + delta)
            reached.add(name)

        module.register_forward_hook(check)
    changed = call(unet)
    assert reached == inner.keys()
    assert not torch.allclose(changed, plain, atol=1e-2)
    with pytest.raises((DgqError, RuntimeError)):  # a packed weight's own words, or torch's of int8
        unet.fuse_lora()
    unet.set_adapters(["one"], [0.0])
    assert torch.equal(call(unet), plain)
    unet.unload_lora()
    assert torch.equal(call(unet), fused)


def test_sequential_offloading_takes_the_weights_away_and_back(unet):
    from accelerate import cpu_offload

    expected = plain_call(unet)
    cpu_offload(unet, execution_device=torch.device("cpu"), offload_buffers=True)
    for layer in layers(unet):
        assert layer.stored.device.type == "meta"
        assert layer._prepared is None  # nothing of it stays
    assert torch.equal(call(unet), expected)
    assert all(layer._prepared is None for layer in layers(unet))


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(unet, kind):
    from diffusers.hooks import apply_group_offloading

    expected = plain_call(unet) if kind == "leaf_level" else call(unet)
    place = torch.device("cpu")
    blocks = 1 if kind == "block_level" else None
    apply_group_offloading(unet, place, place, offload_type=kind, num_blocks_per_group=blocks)
    assert torch.equal(call(unet), expected)


def test_casting_in_place_does_not_pack_again(unet):
    """Layerwise casting moves every layer to another dtype and back around each call."""
    call(unet)
    packed = [layer._prepared for layer in layers(unet)]
    for layer in layers(unet):
        layer.to(torch.float8_e4m3fn).to(torch.float32)
    assert [layer._prepared for layer in layers(unet)] == packed


def test_shards_and_device_maps(unet, tmp_path):
    from diffusers import UNet2DConditionModel

    expected = call(unet)
    unet.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for options in ({}, {"device_map": "cpu"}):
        again = UNet2DConditionModel.from_pretrained(tmp_path, **options)
        assert torch.equal(call(again), expected), options


def test_files_of_formats_1_and_2_still_load(tiny_pipeline, tiny_w8_checkpoint, tmp_path, monkeypatch):
    """Their upsamplers' convolutions read the large picture; those of format 1 hold a convolution's int8 weight as a
    matrix (N, kh * kw * C)."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    from dgq.families.unet import UNet

    old = tmp_path / "old"
    shutil.copytree(tiny_w8_checkpoint, old)
    with monkeypatch.context() as patched:
        patched.setattr(UNet, "upsampled", lambda *_: set())
        asked = dgq.DgqConfig(wbits=8)
        made = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet", quantization_config=asked)
        made.save_pretrained(old / "unet")
    expected = call(made)
    file = old / "unet" / "diffusion_pytorch_model.safetensors"
    config = json.loads((old / "unet" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 2
    unet = dgq.load(old, device="cpu", verify=False).unet
    assert not any(layer.plan.upsampled for layer in unet.modules() if isinstance(layer, IntegerLayer))
    assert torch.equal(call(unet), expected)
    config["quantization_config"]["format_version"] = 1
    config["quantization_config"].pop("checksums", None)
    (old / "unet" / "config.json").write_text(json.dumps(config))
    state, reshaped = load_file(file), 0
    for name, tensor in state.items():
        if tensor.dtype == torch.int8 and tensor.dim() == 4:
            state[name], reshaped = tensor.permute(0, 2, 3, 1).flatten(1).contiguous(), reshaped + 1
    assert reshaped > 5
    save_file(state, file, metadata={"format": "pt"})
    assert torch.equal(call(dgq.load(old, device="cpu").unet), expected)


def close(a, b):
    return float((a - b).norm() / b.norm()) < 0.05


def test_layers_left_on_the_disk(unet, tmp_path):
    """By a device map: the hooks that read them also move what a layer is handed, norms of fused blocks say."""
    from diffusers import UNet2DConditionModel

    expected = plain_call(unet)
    unet.save_pretrained(tmp_path)
    parts = {name: "disk" if "down" in name else "cpu" for name, _ in unet.named_children()}
    for number, places in enumerate(({"": "disk"}, parts)):
        options = {"device_map": places, "offload_folder": tmp_path / f"offload-{number}"}
        again = UNet2DConditionModel.from_pretrained(tmp_path, **options)
        assert any(layer.stored.is_meta for layer in layers(again))
        assert close(call(again), expected)
    with pytest.raises(DgqError, match="whose scales would become"):
        UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float16, **options)


def test_the_default_attention_may_take_the_place_of_the_logarithmic(unet):
    expected = call(unet)
    unet.set_default_attn_processor()
    assert {type(one).__name__ for one in unet.attn_processors.values()} == {"AttnProcessor"}
    assert close(call(unet), expected)


def test_blocks_are_found_by_their_names(unet):
    """To compile them one by one, and to keep them on one device."""
    from diffusers.models.attention import BasicTransformerBlock

    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    assert {type(block).__name__ for block in blocks} <= set(unet._get_no_split_modules("auto"))
    expected = call(unet)
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert torch.equal(call(unet), expected)
    torch.compiler.reset()
    unet.dequantize()
    assert not {"_repeated_blocks", "_no_split_modules"} & set(vars(unet))


def test_projections_are_fused_already(unet):
    expected = call(unet)
    with pytest.raises(DgqError, match="read one quantized input already"):
        unet.fuse_qkv_projections()
    assert torch.equal(call(unet), expected)


def load_ip_adapter(unet, generator):
    weights, place = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                weights[f"{place}.{part}.weight"] = torch.randn(width, 32, generator=generator)
            place += 2
    projection = {
        "proj.weight": torch.randn(4 * 32, 16, generator=generator),
        "proj.bias": torch.zeros(4 * 32),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    unet._load_ip_adapter_weights([{"ip_adapter": weights, "image_proj": projection}])


def test_an_ip_adapter(unet):
    generator = torch.Generator().manual_seed(0)
    load_ip_adapter(unet, generator)
    kinds = {name.split(".")[-2]: type(one).__name__ for name, one in unet.attn_processors.items()}
    assert kinds == {"attn1": "LogAttnProcessor", "attn2": "IPAdapterAttnProcessor2_0"}
    sample, text = (
        torch.randn(size, generator=torch.Generator().manual_seed(0)) for size in ((2, 4, 8, 8), (2, 24, 32))
    )
    pictures = {"image_embeds": [torch.randn(2, 1, 16, generator=generator)]}
    with torch.no_grad():
        result = unet(sample, torch.tensor(500), text, added_cond_kwargs=pictures).sample
        others = {"image_embeds": [-pictures["image_embeds"][0]]}
        assert not close(unet(sample, torch.tensor(500), text, added_cond_kwargs=others).sample, result)
    assert bool(torch.isfinite(result).all())


@pytest.fixture(params=[False, True], ids=["loaded", "saved"])
def attentive(request, tiny_pipeline, tmp_path, monkeypatch):
    """A pipeline with log attention of 6 bits, as it was loaded and after it was saved too."""
    monkeypatch.setattr(native, "attention_pays", lambda: True)
    config = PipelineQuantizationConfig(quant_mapping={"unet": dgq.DgqConfig(abits=6)})
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline, quantization_config=config)
    if request.param:
        pipe.save_pretrained(tmp_path)
    return pipe


def test_an_ip_adapter_that_is_unloaded(attentive):
    """Attention is what it was, of 6 bits here, and to itself meanwhile."""
    pipe = attentive
    expected = call(pipe.unet)
    load_ip_adapter(pipe.unet, torch.Generator().manual_seed(0))
    plans = {one.plan for one in pipe.unet.attn_processors.values() if isinstance(one, LogAttnProcessor)}
    assert plans == {AttentionPlan.for_activations(6)}
    pipe.unload_ip_adapter()
    assert torch.equal(call(pipe.unet), expected)


def test_attention_that_was_sliced(attentive):
    """It is float while it is sliced, and then what it was."""
    pipe = attentive
    expected = call(pipe.unet)
    pipe.enable_attention_slicing()
    assert not torch.equal(call(pipe.unet), expected)
    pipe.disable_attention_slicing()
    assert torch.equal(call(pipe.unet), expected)


def test_custom_diffusion_computes_in_the_dtype_of_float_weights(unet, tiny_pipeline):
    expected = call(unet)
    with pytest.raises(DgqError, match="packed integers"):
        unet.set_attn_processor(CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False))
    assert torch.equal(call(unet), expected)
    config = dgq.DgqConfig(wbits=8, modules_to_not_convert=["to_q"])
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet", quantization_config=config)
    expected = call(unet)
    unet.set_attn_processor(CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False))
    assert close(call(unet), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["block", "skip_attention", "skip_ff", "skip_attention_scores"])
def test_layers_that_guiders_skip(tiny_pipeline, tiny_w8_checkpoint, what, backend, monkeypatch):
    """As in the float model: a block, its attention to itself, its feed-forward part, or the scores alone."""
    monkeypatch.setenv("DGQ_BACKEND", backend)
    monkeypatch.setattr(native, "attention_pays", lambda: True)
    parts = dict.fromkeys(("skip_attention", "skip_ff", "skip_attention_scores"), False) | {what: True}
    config = LayerSkipConfig(
        indices=[0], fqn="mid_block.attentions.0.transformer_blocks", **({} if what == "block" else parts)
    )
    results = []
    for folder in (tiny_pipeline, tiny_w8_checkpoint):
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        whole, block = call(unet), unet.mid_block.attentions[0].transformer_blocks[0]
        x, text = (torch.randn(1, n, w, generator=torch.Generator().manual_seed(n)) for n, w in ((16, 64), (24, 32)))
        apply_layer_skip(unet, config)
        with torch.no_grad():
            results.append(block(x, encoder_hidden_states=text))
        assert not close(call(unet), whole)
    assert_close(what, results[1], results[0], 0.03)


def motion_adapter():
    torch.manual_seed(0)
    return MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=8,
        use_motion_mid_block=False,
    )


def test_networks_that_copy_a_unets_weights_say_that_they_are_packed(tiny_checkpoint):
    pipe = dgq.load(tiny_checkpoint, device="cpu")
    with pytest.raises(DgqError, match=r"UNetMotionModel.from_unet2d copies float weights"):
        AnimateDiffPipeline.from_pipe(pipe, motion_adapter=motion_adapter())
    with pytest.raises(DgqError, match=r"ControlNetModel.from_unet copies float weights"):
        ControlNetModel.from_unet(pipe.unet)
    pipe.unet.dequantize()
    moving = UNetMotionModel.from_unet2d(pipe.unet, motion_adapter())
    assert torch.equal(moving.conv_in.weight, pipe.unet.conv_in.weight)
    ControlNetModel.from_unet(pipe.unet)


@pytest.mark.parametrize("wbits", [4, 8])
@pytest.mark.parametrize(
    ("builder", "kind", "sizes"),
    [
        (tiny_transformers.sd3, SD3ControlNetModel, {}),
        (
            tiny_transformers.flux,
            FluxControlNetModel,
            {"num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2},
        ),
    ],
    ids=["sd3", "flux"],
)
def test_controlnets_that_copy_a_transformers_weights_say_that_they_are_packed(tmp_path, builder, kind, sizes, wbits):
    pipe = DiffusionPipeline.from_pretrained(
        builder(tmp_path / "float"),
        quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": dgq.DgqConfig(wbits=wbits)}),
    )
    with pytest.raises(DgqError, match=rf"{kind.__name__}.from_transformer copies float weights"):
        kind.from_transformer(transformer=pipe.transformer, num_layers=1, **sizes)
    pipe.transformer.dequantize()
    made = kind.from_transformer(pipe.transformer, num_layers=1, **sizes)
    queries = "transformer_blocks.0.attn.to_q"
    assert torch.equal(made.get_submodule(queries).weight, pipe.transformer.get_submodule(queries).weight)


def test_a_motion_unet_is_quantized_itself(tiny_pipeline, tmp_path):
    """Its modules call layers by the name of their argument."""
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    UNetMotionModel.from_unet2d(unet, motion_adapter()).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, 2, 8, 8, generator=generator), torch.randn(2, 24, 32, generator=generator)
    results = []
    for config in (None, dgq.DgqConfig(wbits=8)):
        network = UNetMotionModel.from_pretrained(tmp_path, quantization_config=config)
        with torch.no_grad():
            results.append(network(sample, torch.tensor(500), text).sample)
    assert any(isinstance(module, IntegerLayer) for name, module in network.named_modules() if "motion_modules" in name)
    assert (results[1] - results[0]).norm() < 0.1 * results[0].norm()


def test_another_pipeline_takes_the_model_over(tiny_checkpoint):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = dgq.load(tiny_checkpoint, device="cpu")
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet
    with pytest.raises(ValueError, match="quantized model to a new `dtype`"):
        StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.float16)
    assert pipe.unet.dtype == torch.float32


def test_copies_and_pickles_answer_for_themselves(unet, tmp_path):
    expected, number = call(unet), unet.num_parameters()
    torch.save(unet, tmp_path / "model.pt")
    for again in (copy.deepcopy(unet), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(call(again), expected)
        again.dequantize()
        assert again.num_parameters() == number == unet.num_parameters()
    assert torch.equal(call(unet), expected)
