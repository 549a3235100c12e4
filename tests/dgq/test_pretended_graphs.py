"""CUDA graphs on pretended devices, of every kind of network and with all that is loaded onto one.

A tape stands for the graph, as in test_graphs.py. This one refuses what CUDA refuses within a capture: to wait for the
device, and to copy between devices. It runs on the second device while the first one is current.
"""

import contextlib
import logging

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.quantizers import PipelineQuantizationConfig
from pretended_devices import Placed, Pretended
from tiny_transformers import BUILDERS

import dgq
from dgq import graphs
from dgq.calibration.run import Options, calibrate
from dgq.family import FAMILIES, family_of, network_of
from dgq.graphs import Graphs
from dgq.integer.layer import IntegerLayer
from dgq.pictures.generation import Settings, generate
from dgq.recipe import Recipe
from dgq.tuning import train as tuning
from tests.dgq.integer.test_adapters import lora_files
from tests.dgq.test_graphs import Tape, Traced, told
from tests.dgq.tuning.test_train import subject  # noqa: F401 (a fixture)

aten = torch.ops.aten
PLACE = torch.device("cuda:1")
WAIT = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
BY_INDEX = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class Capturable(Tape):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        by_mask = function in BY_INDEX and any(x is not None and x.dtype == torch.bool for x in arguments[1])
        if function in WAIT or by_mask:
            raise RuntimeError(f"{function} waits for the device")
        result = super().__torch_dispatch__(function, types, arguments, keywords)
        if function in (aten._to_copy.default, aten.copy_.default):
            source = arguments[function is aten.copy_.default]
            if source.device != result.device:
                raise RuntimeError(f"a copy from {source.device} to {result.device}")
        return result


class OnDevice(Traced):
    """Captures and replays where its device is current."""

    tape = Capturable

    def __init__(self, current):
        super().__init__()
        self.current, self.place = current, PLACE

    def __call__(self, run, pool):
        place = self.current[0]
        assert place == self.place
        replay, returned = super().__call__(run, pool)

        def there():
            assert self.current == [place]
            replay()

        return there, returned


@pytest.fixture
def current(monkeypatch):
    """[the current device], where graphs take pretended devices for real ones."""
    now = [torch.device("cuda:0")]

    @contextlib.contextmanager
    def device(place):
        before, now[0] = now[0], torch.device(place)
        yield
        now[0] = before

    monkeypatch.setattr(graphs, "traced", lambda first: not isinstance(first, Placed))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: ("stream", place.index))
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # another thread knows of no pretended devices
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (2**34, 2**34))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return now


def loaded(folder, current, **options):
    """A pipeline on the second device, and what captures its network's calls."""
    pipe = dgq.load(folder, device=PLACE, dtype=torch.float32, **options)
    network = network_of(pipe)
    assert isinstance(network.forward, Graphs)
    network.forward.capture = did = OnDevice(current)
    return pipe, did


def draw(pipe, settings):
    return generate(pipe, ["a cat"], settings)[0].latents.cpu()


def eagerly(pipe, settings):
    network = network_of(pipe)
    held = network.__dict__.pop("forward")
    drawn = draw(pipe, settings)
    network.forward = held
    return drawn


def distance(got, expected):
    return float((got.cpu() - expected).norm() / expected.norm())


def test_a_pipeline_that_was_moved_is_joined(tiny_pipeline, current):
    """As one that `dgq.load` makes there."""
    config = PipelineQuantizationConfig(quant_mapping={"unet": dgq.DgqConfig(wbits=8)})
    settings = Settings(steps=3, guidance=3.0, seed=1)
    with Pretended():
        pipe = DiffusionPipeline.from_pretrained(tiny_pipeline, quantization_config=config).to(PLACE)
        dgq.use_graphs(pipe)
        pipe.unet.forward.capture = did = OnDevice(current)
        layers = [module for module in pipe.unet.modules() if isinstance(module, IntegerLayer)]
        for captured in (1, 2):
            drawn = draw(pipe, settings)
            assert did.captured == captured
            assert sum(layer.prepared(PLACE).joined is not None for layer in layers) >= 3
            assert distance(eagerly(pipe, settings), drawn) < 1e-3
            pipe.to("cpu")
            pipe.to(PLACE)


@pytest.mark.parametrize(
    "name",
    [one if one in ("flux2-klein", "z-image") else pytest.param(one, marks=pytest.mark.slow) for one in BUILDERS],
)
def test_transformers_are_captured(name, tmp_path, current, monkeypatch, caplog):
    """Their attention is torch's; in W4A8 one's layers of one input are one product. Z-Image takes lists of samples."""
    for family in FAMILIES:  # Qwen-Image and others say 1024
        if "default_size" in vars(type(family)):
            monkeypatch.setattr(type(family), "default_size", lambda self, pipe: (16, 16))
    folder, wbits = tmp_path / "out", 4 if name == "flux" else 8
    recipe = Recipe(wbits=wbits, rounding="nearest", channels="none")
    calibrate(BUILDERS[name](tmp_path / "float"), folder, recipe, Options(prompts=["a cat"], steps=1, evaluate=0))
    settings = Settings(steps=4, seed=3).resolved(folder)
    with Pretended() as mode, caplog.at_level(logging.WARNING):
        pipe, did = loaded(folder, current)
        layers = [module for module in network_of(pipe).modules() if isinstance(module, IntegerLayer)]
        assert any(layer._prepared.joined for layer in layers)
        got = draw(pipe, settings)
        calls = settings.steps * (2 if family_of(network_of(pipe)).separate_guidance else 1)
        assert did.captured in (1, calls // settings.steps)  # a negative prompt of another length has its own
        assert did.replayed == calls - did.captured
        assert torch.equal(eagerly(pipe, settings), got)
    assert not told(caplog)
    assert {device for _, device in mode.ran} == {PLACE}
    assert {"quantize_rows", f"linear_int{wbits}"} <= {op.__name__.split(".")[0] for op, _ in mode.ran}
    monkeypatch.setenv("DGQ_BACKEND", "reference")
    assert distance(draw(dgq.load(folder, device="cpu"), settings), got) < 0.01


def test_loras_of_files(tiny_checkpoint, tiny_pipeline, tmp_path, current, monkeypatch, caplog):
    """Two of them loaded, mixed, and taken off again, on a pipeline that then moves to the other device."""
    files = [lora_files(tiny_pipeline, tmp_path / str(seed), seed, text=True) for seed in (1, 2)]
    settings = Settings(steps=3, guidance=3.0, seed=1)

    def load(pipe):
        for name, file in zip("ab", files, strict=True):
            pipe.load_lora_weights(file, adapter_name=name)
        pipe.set_adapters(["a", "b"], [0.7, 0.4])

    with Pretended() as mode, caplog.at_level(logging.WARNING):
        pipe, did = loaded(tiny_checkpoint, current)
        plain = draw(pipe, settings)
        load(pipe)
        mixed = draw(pipe, settings)
        assert torch.equal(eagerly(pipe, settings), mixed)
        pool = pipe.unet.forward.pool
        pipe.set_adapters("a")
        alone = draw(pipe, settings)
        pipe.unload_lora_weights()
        assert torch.equal(draw(pipe, settings), plain)
        assert did.captured == 4
        pipe.to("cuda:0")
        did.place = torch.device("cuda:0")
        assert distance(draw(pipe, settings), plain) < 1e-3
        assert did.captured == 5
        assert pipe.unet.forward.pool is not pool  # what is captured on another device takes no memory of the first
    assert not told(caplog)
    assert {device for _, device in mode.ran} == {PLACE, did.place}
    assert distance(alone, mixed) > 0.18 < distance(mixed, plain)
    monkeypatch.setenv("DGQ_BACKEND", "reference")
    pipe = dgq.load(tiny_checkpoint, device="cpu")
    load(pipe)
    assert distance(draw(pipe, settings), mixed) < 0.12  # single codes move, and guidance magnifies what they do


@pytest.mark.slow
def test_tuned_scales_of_a_run_on_the_device(tiny_checkpoint, subject, tmp_path, current, monkeypatch, caplog):  # noqa: F811
    """Interrupted and resumed; then drawn with, an expert for each half of the timesteps."""
    out, losses = tmp_path / "one.safetensors", []

    def run(resume):
        def progress(stage, done, total, detail):
            if stage == "tune" and done == 2:
                losses.append(detail)
                if not resume:
                    raise KeyboardInterrupt

        options = tuning.Options(
            steps=2, batch=1, learning_rate=0.05, checkpoint_every=1, mixed_precision="no", device=PLACE, resume=resume
        )
        tuning.tune(tiny_checkpoint, [(subject, "a photo of sks cat")], out, options, progress)

    settings = Settings(steps=4, guidance=1.0, seed=1)
    with Pretended() as mode, caplog.at_level(logging.WARNING):
        with pytest.raises(KeyboardInterrupt):
            run(False)
        run(True)
        pipe, did = loaded(tiny_checkpoint, current)
        plain = draw(pipe, settings)
        dgq.load_tuned(pipe, out, strength=3)
        got = draw(pipe, settings)
        assert did.captured == 3
        assert torch.equal(eagerly(pipe, settings), got)
        dgq.unload_tuned(pipe)
        assert torch.equal(draw(pipe, settings), plain)
    assert not told(caplog)
    assert {device for _, device in mode.ran} == {PLACE}
    assert losses[0] == losses[1]
    assert distance(got, plain) > 0.01
    pipe = dgq.load(tiny_checkpoint, device="cpu")
    dgq.load_tuned(pipe, out, strength=3)
    monkeypatch.setenv("DGQ_BACKEND", "reference")
    assert distance(draw(pipe, settings), got) < 0.06


@torch.no_grad()
def test_the_decoder_is_the_cpus(tiny_checkpoint, monkeypatch):
    """Its int8 convolutions, in half precision and, as pipelines turn it for that, in float32."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {}
    with Pretended() as mode:
        vae = dgq.load(tiny_checkpoint, device=PLACE).vae
        found["half"] = vae.decode(z.to(PLACE, torch.float16)).sample.cpu()
        vae.to(dtype=torch.float32)
        found["single"] = vae.decode(z.to(PLACE)).sample.cpu()
        vae.enable_tiling()
        vae.tile_latent_min_size = 4
        vae.decode(z.to(PLACE))
    assert found["half"].dtype == torch.float16
    assert {device for _, device in mode.ran} == {PLACE}
    ran = {op.__name__.split(".")[0] for op, _ in mode.ran if op.namespace == "dgq"}
    assert {"group_norm_quantize_samples", "conv2d", "linear_int8"} <= ran
    monkeypatch.setenv("DGQ_BACKEND", "reference")
    expected = dgq.load(tiny_checkpoint, device="cpu").vae.decode(z).sample
    assert distance(found["single"], expected) < 0.02  # codes that round to another side: 0.0101 on a Skylake
    assert distance(found["half"], expected) < 0.02
