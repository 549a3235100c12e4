"""A whole quantized UNet on the Triton path equals the CPU path block by block, runs no pass of torch's before a
quantized layer, and compiles in one graph."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from comparing import assert_close, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from dgq.integer.attention import LogAttnProcessor
from dgq.integer.layer import IntegerLayer
from dgq.integer.shared_input import prepare_all, project
from dgq_kernels import native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Recorded(TorchDispatchMode):
    """Counts the operators that run. Inside an own operator nothing is counted."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.counts[str(function)] += 1
        return function(*arguments, **(keywords or {}))

    def times(self, *names):
        return sum(self.counts[f"{name}.default"] for name in names)


def unet_and_call(folder):
    import dgq

    unet = dgq.load(folder, device="cpu", dtype=torch.float32).unet
    g = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=g)
    context = torch.randn(2, 24, 32, generator=g)
    return unet, (sample, torch.tensor(500), context)


@pytest.fixture(autouse=True)
def attend_in_codes(monkeypatch):
    """Without AVX512 the CPU that is compared with would attend in float."""
    monkeypatch.setattr(native, "attention_pays", lambda: True)


@pytest.fixture(scope="module")
def tiny_w8_checkpoint(tiny_pipeline, tmp_path_factory):
    """W8A8 without channel handling: queries, keys and values share their codes."""
    from dgq.calibration.run import Options, calibrate
    from dgq.recipe import Recipe

    out = tmp_path_factory.mktemp("checkpoints") / "tiny-w8a8"
    recipe = Recipe(wbits=8, abits=8, rounding="nearest", channels="none")
    calibrate(tiny_pipeline, out, recipe, Options(prompts=["a cat", "a dog"], steps=2, evaluate=1))
    return out


@pytest.fixture(scope="module", params=["tiny_checkpoint", "tiny_w8_checkpoint"])
def checkpoint(request):
    return request.getfixturevalue(request.param)


def on_triton(folder, monkeypatch):
    monkeypatch.setenv("DGQ_BACKEND", "triton")
    unet, call = unet_and_call(folder)
    unet = unet.to(DEVICE)
    prepare_all(unet, torch.device(DEVICE))
    return unet, tuple(x.to(DEVICE) for x in call)


@dataclass
class Run:
    """One call on the Triton path: its output, each block's arguments and output, and the operators that ran."""

    unet: torch.nn.Module
    output: torch.Tensor
    blocks: dict
    times: Callable[..., int]


@pytest.fixture(scope="module")
@torch.no_grad()
def run(checkpoint):
    blocks = {}

    def keep(name):
        def hook(module, arguments, keywords, output):
            blocks[name] = (arguments, keywords, output)

        return hook

    with pytest.MonkeyPatch.context() as patch:
        unet, call = on_triton(checkpoint, patch)
        names = [name for name, _ in unet.named_modules() if name.count(".") == 1 and "blocks" in name]
        for name in (*names, "mid_block", "time_embedding"):
            unet.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True)
        with Recorded() as recorded:
            output = unet(*call).sample
    return Run(unet, output, blocks, recorded.times)


@torch.no_grad()
def test_a_unet_on_triton_equals_the_cpu(run, checkpoint):
    """A float in the last digit may move a code by a step, which the layers after it magnify: so far may it differ."""
    unet, (sample, *rest) = unet_and_call(checkpoint)
    expected = unet(sample, *rest).sample
    torch.manual_seed(0)
    moved = [sample * (1 + 2**-22 * torch.randn(sample.shape)) for _ in range(10)]
    digits = max(relative_error(unet(x, *rest).sample, expected) for x in moved)
    assert digits < 0.1
    assert_close("output", run.output, expected, max(2e-2, 2 * digits))


@torch.no_grad()
def test_every_block_equals_the_cpus(run, checkpoint):
    """On the same input, so that no difference hides behind another block's. What the last digits of a float do to a
    block's codes on the CPU alone, they may do here: how much depends on the machine that calibrated the model."""
    unet, _ = unet_and_call(checkpoint)

    def move(x, noise):
        if isinstance(x, torch.Tensor):
            return x.cpu() * (1 + noise * torch.randn(x.shape)) if x.is_floating_point() else x.cpu()
        return type(x)(move(part, noise) for part in x) if isinstance(x, tuple | list) else x

    def on_cpu(name, arguments, keywords, noise=0.0):
        keywords = {key: move(x, noise) for key, x in keywords.items()}
        y = unet.get_submodule(name)(*move(arguments, noise), **keywords)
        return y[0] if isinstance(y, tuple) else y

    assert len(run.blocks) == 6
    for name, (arguments, keywords, got) in run.blocks.items():
        expected = on_cpu(name, arguments, keywords)
        torch.manual_seed(0)
        digits = max(relative_error(on_cpu(name, arguments, keywords, 2**-22), expected) for _ in range(20))
        got = got[0] if isinstance(got, tuple) else got
        assert_close(name, got, expected, max(1e-2, 2 * digits))


def times(unet):
    return [module.time_emb_proj for module in unet.modules() if hasattr(module, "time_emb_proj")]


def products(layers):
    """How many take the place of layers that read one tensor."""
    shared = [layer.prepare(torch.device(DEVICE)).shared for layer in layers]
    return shared.count(None) + len({*shared} - {None})


def test_nothing_runs_before_a_quantized_layer(run):
    """Norms, SiLU, GEGLU, residuals and embeddings are part of the ops; what is left belongs to the last, float, layer
    and to the ways between the blocks."""
    assert run.times("aten.native_layer_norm", "aten.gelu", "aten.add", "aten.add_") == 0
    # conv_norm_out and conv_act, before the convolution that stays float
    assert run.times("aten.native_group_norm") <= 1
    assert run.times("aten.silu") <= 1
    kinds = Counter(type(module).__name__ for module in run.unet.modules())
    blocks, resnets = kinds["FusedTransformerBlock"], kinds["FusedResnetBlock"]
    assert blocks > 0
    assert run.times("dgq.quantize_rows") >= blocks  # gated values, which the product's epilogue wrote
    assert run.times("dgq.layer_norm_quantize_rows") >= 3 * blocks
    assert run.times("dgq.group_norm_quantize_rows") == blocks
    assert run.times("dgq.group_norm_quantize_samples") == 2 * resnets
    assert len(times(run.unet)) == resnets
    assert run.times("dgq.silu_quantize_rows") == 1 + products(times(run.unet))
    assert run.times("dgq.log_attention") == 2 * blocks


@pytest.mark.parametrize("checkpoint", ["tiny_w8_checkpoint"], indirect=True)  # others may not
def test_queries_keys_and_values_are_one_product(run, checkpoint):
    plans = [module.plan for module in run.unet.modules() if isinstance(module, IntegerLayer)]
    pairs = sum(isinstance(getattr(m, "processor", None), LogAttnProcessor) for m in run.unet.modules()) // 2
    rows = sum(plan.kind in ("linear", "pointwise") for plan in plans)
    alone = rows - 3 * pairs  # of each pair two fewer for itself, one for the text
    assert products(times(run.unet)) == 1
    assert run.times("dgq.linear_int8") == alone - len(times(run.unet)) + 1


@torch.no_grad()
def test_joined_layers_are_saved_and_loaded_apart(checkpoint, monkeypatch):
    """Slices of one tensor at run time, tensors of their own in a state dict; loading gives up the joined product."""
    expected = unet_and_call(checkpoint)[0].state_dict()
    unet, _ = on_triton(checkpoint, monkeypatch)
    state = unet.state_dict()
    assert all(torch.equal(state[name].cpu(), expected[name]) for name in expected)
    pointers = [x.untyped_storage().data_ptr() for x in state.values() if x.numel()]
    assert len(pointers) == len(set(pointers))
    device = torch.device(DEVICE)
    joined = [m for m in unet.modules() if isinstance(m, IntegerLayer) and m.prepare(device).joined]
    assert joined
    layers = joined[0].prepare(device).joined.layers
    x = torch.randn(2, 10, layers[0].in_features, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    norm = torch.nn.LayerNorm(x.shape[-1]).to(DEVICE)
    before = project(layers, x, norm)
    for got, layer in zip(before, layers, strict=True):
        torch.testing.assert_close(got, layer(x, norm=norm), rtol=1e-6, atol=1e-6)
    changed, scale = layers[1], layers[1].weight_scale.clone()
    changed.load_state_dict({**changed.state_dict(), "weight_scale": 2 * scale})
    after = project(layers, x, norm)
    assert_close("output", after[0], before[0], 1e-6)
    assert relative_error(after[1], before[1]) > 0.5
    prepare_all(unet, device)
    assert torch.equal(project(layers, x, norm)[1], after[1])


@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint"], indirect=True)  # one takes long enough
@torch.no_grad()
def test_a_unet_compiles_in_one_graph(run, checkpoint, monkeypatch):
    """No graph break, hence no value read back by the host: Dynamo traces a step on fake tensors."""
    unet, call = on_triton(checkpoint, monkeypatch)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    got = torch.compile(unet, backend=keep, fullgraph=True)(*call).sample
    torch.testing.assert_close(got, run.output, rtol=1e-4, atol=1e-4)
    (graph,) = graphs
    called = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    assert sum(count for name, count in called.items() if "log_attention" in name) == run.times("dgq.log_attention")
    methods = {node.target for node in graph.graph.nodes if node.op == "call_method"}
    assert not methods & {"item", "tolist", "cpu", "numpy", "nonzero"}
