"""Tuned scales in a pipeline: what they change, what they leave, and whose they are."""

import dataclasses

import pytest
import tiny_transformers
import torch
from safetensors.torch import load_file, save_file

import dgq
from dgq.errors import DgqError
from dgq.integer.plan import input_owners
from dgq.pictures.generation import Settings, generate
from dgq.tuning.apply import attach
from dgq.tuning.file import Base, Description, Subject, Tuned, content_hash, describe, read, write
from dgq.tuning.forward import Experts, differentiable
from dgq.tuning.layout import Layout, integer_layers
from dgq_kernels import native

FAST = Settings(steps=3, guidance=3.0, seed=7)


def tuned_scales(unet, experts=2, input_scales=True, size=0.1, seed=0):
    layout = Layout.of(unet, input_scales)
    vectors = torch.randn(experts, layout.size, generator=torch.Generator().manual_seed(seed)) * size
    base = Base("tiny", "integer W4A8", content_hash(unet))
    subjects = [Subject("a photo of sks cat", 3)]
    return Tuned(Description(base, experts, 1000, input_scales, subjects, 5), vectors)


def draw(pipe):
    return generate(pipe, ["a cat"], FAST)[0].latents


@pytest.fixture
def pipe(tiny_checkpoint):
    return dgq.load(tiny_checkpoint)


@pytest.fixture
def file(pipe, tmp_path):
    place = tmp_path / "sks.safetensors"
    write(place, tuned_scales(pipe.unet), Layout.of(pipe.unet, True))
    return place


def test_loading_changes_pictures_and_unloading_gives_them_back_bit_for_bit(pipe, file):
    plain = draw(pipe)
    dgq.load_tuned(pipe, file)
    tuned = draw(pipe)
    assert not torch.equal(plain, tuned)
    assert torch.equal(tuned, draw(pipe))
    dgq.set_tuned(pipe, {"sks": 0.0})
    assert torch.equal(plain, draw(pipe))
    dgq.set_tuned(pipe, {"sks": 0.5})
    half = draw(pipe)
    assert not torch.equal(half, tuned)
    assert not torch.equal(half, plain)
    dgq.set_tuned(pipe, {"sks": 1.0})
    assert torch.equal(tuned, draw(pipe))
    dgq.unload_tuned(pipe)
    assert torch.equal(plain, draw(pipe))
    assert not pipe.unet._forward_pre_hooks
    dgq.unload_tuned(pipe)  # nothing is there any more


def test_two_files_add_up(pipe, file, tmp_path):
    other = tmp_path / "zwx.safetensors"
    scales = tuned_scales(pipe.unet, experts=3, input_scales=False, seed=1)
    write(other, scales, Layout.of(pipe.unet, False))
    dgq.load_tuned(pipe, file)
    dgq.load_tuned(pipe, other)
    both = draw(pipe)
    dgq.unload_tuned(pipe, "sks")
    one = draw(pipe)
    assert not torch.equal(both, one)
    dgq.load_tuned(pipe, file, strength=1.0, name="again")
    assert torch.allclose(draw(pipe), both, atol=1e-3)  # another order of sums


def test_the_expert_follows_the_timestep(pipe):
    """With the second expert untouched, early steps are the checkpoint's and late ones are not."""
    scales = tuned_scales(pipe.unet)
    scales.vectors[1] = 0
    argument = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.randn(1, 24, 32)

    def call(t):
        with torch.no_grad():
            return pipe.unet(argument[0], t, encoder_hidden_states=argument[1]).sample

    plain = {t: call(t) for t in (10, 499, 500, 990)}
    attach(pipe, "half", scales)
    for t in (10, 990, 499, 500):
        same = float((call(torch.tensor(t)) - plain[t]).norm() / plain[t].norm()) < 0.02
        assert same == (t >= 500)


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("wbits", [4, 8])
def test_the_integer_forward_is_the_one_that_was_trained(tiny_pipeline, tmp_path, engine, wbits, monkeypatch):
    """Scales as they are trained, on float activations, and as they are drawn with: apart by the rounding alone."""
    from dgq.calibration.run import Options, calibrate
    from dgq.recipe import Recipe

    if not engine:
        monkeypatch.setattr(native, "available", lambda: False)
    recipe = Recipe(wbits=wbits, rounding="nearest", channels="shift", attention="float")
    calibrate(tiny_pipeline, tmp_path / "ckpt", recipe, Options(prompts=["a cat"], steps=2, evaluate=0))
    pipe = dgq.load(tmp_path / "ckpt")
    assert any(layer.plan.channels == "shift" for layer in integer_layers(pipe.unet).values())
    scales = tuned_scales(pipe.unet, size=0.2)
    g = torch.Generator().manual_seed(0)
    call = {
        "sample": torch.randn(1, 4, 8, 8, generator=g),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": torch.randn(1, 24, 32, generator=g),
    }
    experts = Experts(Layout.of(pipe.unet, True), 2, 1000, torch.device("cpu"))
    with torch.no_grad():
        plain = pipe.unet(**call).sample
        for vector, values in zip(experts.vectors, scales.vectors, strict=True):
            vector.copy_(values)
        with differentiable(pipe.unet, experts):
            experts.choose([700])
            trained = pipe.unet(**call).sample
        assert torch.equal(pipe.unet(**call).sample, plain)
        attach(pipe, "x", scales)
        drawn = pipe.unet(**call).sample
    assert float((drawn - trained).norm() / trained.norm()) < 0.05
    assert float((plain - trained).norm() / trained.norm()) > 0.2


def test_layers_of_one_input_share_its_scale_and_its_codes(pipe, file, monkeypatch):
    owners = input_owners(pipe.unet, integer_layers(pipe.unet))
    attention = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert owners[f"{attention}.attn1.to_v"] == f"{attention}.attn1.to_q"
    assert owners[f"{attention}.attn2.to_v"] == f"{attention}.attn2.to_k"
    assert owners[f"{attention}.attn2.to_q"] == f"{attention}.attn2.to_q"
    counts = []
    inner = native.linear
    draw(pipe)
    times = [layer._prepared.engine for layer in integer_layers(pipe.unet).values() if layer._prepared.shared]
    assert times  # time embeddings share codes too, until each is tuned with an input scale of its own

    def counted(layers, *arguments, **keywords):
        counts.extend([len(layers)] if layers[0] not in times else [])
        return inner(layers, *arguments, **keywords)

    monkeypatch.setattr(native, "linear", counted)
    draw(pipe)
    plain, counts[:] = sorted(counts), []
    dgq.load_tuned(pipe, file)
    draw(pipe)
    assert sorted(counts) == plain
    assert plain[-1] == 3


def test_beside_a_lora(pipe, file):
    from peft import LoraConfig

    plain = draw(pipe)
    dgq.load_tuned(pipe, file)
    tuned = draw(pipe)
    dgq.unload_tuned(pipe)
    pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v", "conv_shortcut"])
    )  # begins as a change of nothing
    dgq.load_tuned(pipe, file)
    # a norm in front of a layer with an adapter is torch's: single codes move
    error, change = ((one - tuned).norm() / tuned.norm() for one in (draw(pipe), plain))
    assert error < 0.1 < 0.2 < change


def test_moving_the_model_keeps_the_scales(pipe, file):
    dgq.load_tuned(pipe, file)
    tuned = draw(pipe)
    for layer in integer_layers(pipe.unet).values():
        layer.restore()  # what a move does: the backend's form is made anew
    assert torch.equal(tuned, draw(pipe))


def test_state_dict_is_the_checkpoints(pipe, file):
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    dgq.load_tuned(pipe, file)
    draw(pipe)
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_hash_is_of_content_and_of_no_form(pipe, tiny_checkpoint, monkeypatch):
    first = content_hash(pipe.unet)
    monkeypatch.setattr(native, "available", lambda: False)
    other = dgq.load(tiny_checkpoint)
    assert content_hash(other.unet) == first
    layer = next(iter(integer_layers(other.unet).values()))
    with torch.no_grad():
        layer.weight_scale[0] *= 1.001
    assert content_hash(other.unet) != first


def test_equal_scales_are_equal_files(pipe, file, tmp_path):
    for i in range(12):
        other = tmp_path / f"{i}.safetensors"
        write(other, tuned_scales(pipe.unet), Layout.of(pipe.unet, True))
        assert other.read_bytes() == file.read_bytes()


def test_a_file_tells_what_it_holds(pipe, file):
    about, shapes = describe(file)
    assert about == dataclasses.replace(tuned_scales(pipe.unet).about)
    assert shapes["mid_block.resnets.0.conv1.out"] == (2, 64)
    assert read(file, pipe.unet).vectors.shape == (2, Layout.of(pipe.unet, True).size)
    assert max(abs(read(file, pipe.unet).vectors - tuned_scales(pipe.unet).vectors).flatten()) < 5e-4


def rewritten(file, change, metadata=None):
    from safetensors import safe_open

    with safe_open(str(file), "pt") as handle:
        found = handle.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, found if metadata is None else metadata(found))


def _with(old, new):
    return lambda found: {**found, "dgq_tuned": found["dgq_tuned"].replace(old, new)}


NAME = "mid_block.resnets.0.conv1.out"


@pytest.mark.parametrize(
    "change, metadata, message",
    [
        (lambda t: t.pop(NAME), None, f"tensor '{NAME}' is missing"),
        (lambda t: t.update(extra=t[NAME].clone()), None, "tensor 'extra' is unknown"),
        (lambda t: t.update({NAME: t[NAME][:1].clone()}), None, f"tensor '{NAME}' is torch.float16"),
        (lambda t: t.update({NAME: t[NAME][:, :5].clone()}), None, f"tensor '{NAME}' has 5 values, expected 64"),
        (lambda t: t.update({NAME: t[NAME].float()}), None, f"tensor '{NAME}' is torch.float32"),
        (lambda t: t[NAME][0, 0].fill_(float("nan")), None, f"tensor '{NAME}' holds values that are not finite"),
        (lambda t: t[NAME][0, 0].mul_(2), None, "another checksum"),
        (lambda t: None, _with('"steps": ', '"steps": 1'), "another checksum"),
        (lambda t: None, lambda found: {"format": "pt"}, "holds no tuned scales"),
        (lambda t: None, _with('"format_version": 1', '"format_version": 9'), "format version 9"),
        (lambda t: None, _with('"experts": 2', '"experts": 0'), "0 experts"),
        (lambda t: None, _with('"experts": 2', '"experts": "2"'), "experts '2' is not a whole number"),
        (lambda t: None, _with('"steps"', '"stepz"'), "unknown field 'stepz'"),
        (lambda t: None, _with("{", "["), "no JSON"),
    ],
)
def test_damaged_files_are_refused_by_name(pipe, file, change, metadata, message):
    rewritten(file, change, metadata)
    plain = draw(pipe)
    with pytest.raises(DgqError, match=str(file)) as raised:
        dgq.load_tuned(pipe, file)
    assert message in str(raised.value)
    assert torch.equal(plain, draw(pipe))


def test_a_cut_file_and_another_checkpoints_are_refused(pipe, file, tiny_pipeline, tmp_path):
    layer = next(iter(integer_layers(pipe.unet).values()))
    with torch.no_grad():
        layer.weight_scale[0] *= 2
    with pytest.raises(DgqError, match=r"was tuned on another checkpoint, tiny \(integer W4A8, content"):
        dgq.load_tuned(pipe, file)
    with pytest.raises(DgqError, match="no integer layer"):
        dgq.load_tuned(dgq.load(tiny_pipeline), file)
    transformer = dgq.load(tiny_transformers.flux(tmp_path / "flux"))
    with pytest.raises(DgqError, match="tuned scales are a UNet's, and this pipeline has none"):
        dgq.load_tuned(transformer, file)
    with pytest.raises(DgqError, match="no tuned scales of the name 'x'"):
        dgq.unload_tuned(transformer, "x")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DgqError, match="not a readable safetensors file"):
        dgq.load_tuned(pipe, file)


def test_wrong_names_and_strengths(pipe, file):
    with pytest.raises(DgqError, match="no tuned scales of the name 'sks'"):
        dgq.set_tuned(pipe, {"sks": 1})
    with pytest.raises(DgqError, match="strength nan"):
        dgq.load_tuned(pipe, file, float("nan"))
    dgq.load_tuned(pipe, file)
    with pytest.raises(DgqError, match="are loaded already"):
        dgq.load_tuned(pipe, file)
    with pytest.raises(DgqError, match="name 'other'"):
        dgq.unload_tuned(pipe, "other")
