"""Calls replayed from graphs. Without a CUDA device a tape of torch's operators stands for the graph: as a graph does,
it repeats what ran, on the same tensors, and knows nothing of the Python that asked for it."""

import contextlib
import copy
import functools
import gc
import logging
import pickle
import weakref
from types import SimpleNamespace

import peft
import pytest
import tiny_pipelines
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dgq
from dgq import graphs
from dgq.family import network_of
from dgq.graphs import Graphs
from dgq.pictures.generation import Settings, generate

CUDA = torch.cuda.is_available()


class Tape(TorchDispatchMode):
    """Operators as they ran: each takes the repeated results in place of those that it took."""

    def __init__(self):
        super().__init__()
        self.steps = []  # operator, arguments' leaves and form, {leaf: which result}, which results it makes
        self.made = []  # all results; kept, so that no other tensor is taken for one of them
        self.places = {}  # id of a result -> which

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a graph cannot wait for a number")
        leaves, form = pytree.tree_flatten((arguments, keywords or {}))
        taken = {place: self.places[id(leaf)] for place, leaf in enumerate(leaves) if id(leaf) in self.places}
        result = function(*arguments, **(keywords or {}))
        numbers = []
        for one in pytree.tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self.places[id(one)] = len(self.made)
                self.made.append(one)
            numbers.append(self.places.get(id(one)))
        self.steps.append((function, leaves, form, taken, numbers))
        return result

    def repeat(self, wanted):
        """Run all again; returns what stands for the tensors of `wanted`."""
        results = list(self.made)
        for function, leaves, form, taken, numbers in self.steps:
            given = [results[taken[place]] if place in taken else leaf for place, leaf in enumerate(leaves)]
            arguments, keywords = pytree.tree_unflatten(given, form)
            for number, one in zip(numbers, pytree.tree_leaves(function(*arguments, **keywords)), strict=True):
                if number is not None:
                    results[number] = one
        return [results[self.places[id(tensor)]] if id(tensor) in self.places else tensor for tensor in wanted]


class Traced:
    """Stands for `graphs.capture`; counts calls, and how often the text was projected, apart."""

    tape = Tape

    def __init__(self):
        self.captured = self.replayed = self.projected = 0
        self.graphs = {}  # pool -> what was captured in it

    def __reduce__(self):
        return Traced, ()

    def __call__(self, run, pool):
        with self.tape() as tape:
            found, form = pytree.tree_flatten(run())
        wanted = [leaf for leaf in found if leaf is not None]
        written = [leaf.clone() for leaf in tape.repeat(wanted)]
        self.captured += bool(written)

        def replay():
            self.replayed += bool(written)
            self.projected += not written
            for place, value in zip(written, tape.repeat(wanted), strict=True):
                place.copy_(value)

        earlier = self.graphs.setdefault(pool, [])
        if earlier and not any(graph() for graph in earlier):
            raise RuntimeError("torch takes no pool again whose graphs are all gone")
        earlier.append(weakref.ref(replay))
        return replay, pytree.tree_unflatten(written, form) if written else None


@pytest.fixture(autouse=True)
def by_operators(monkeypatch):
    """The CPU engine is called past torch's dispatcher: a trace would not see it."""
    monkeypatch.setenv("DGQ_BACKEND", "reference")


def graphed(network):
    network.forward = Graphs(network, Traced(), ["cpu"])
    return network


def captures(network):
    return network.forward.capture.captured


@pytest.fixture
def unet(tiny_checkpoint):
    return graphed(dgq.load(tiny_checkpoint, device="cpu").unet)


def call(seed=0, batch=2, size=8):
    generator = torch.Generator().manual_seed(seed)
    sample, text = (torch.randn(shape, generator=generator) for shape in ((batch, 4, size, size), (batch, 24, 32)))
    return {"sample": sample, "timestep": torch.tensor(100 * (seed + 1)), "encoder_hidden_states": text}


@torch.no_grad()
def check(unet, new=None, **more):
    """Four calls, of which the graph has to follow each; `new` of them captures."""
    before = captures(unet)
    for seed in range(4):
        arguments = {**call(seed), **more}
        assert torch.equal(unet(**arguments).sample, unet.forward.plain(**arguments).sample)
    if new is not None:
        assert captures(unet) - before == new


def test_pictures_are_those_of_the_eager_network(tiny_checkpoint):
    pipe = dgq.load(tiny_checkpoint, device="cpu")
    settings = Settings(steps=4, guidance=3.0, seed=1)

    def draw():
        return [picture.latents for picture in generate(pipe, ["a cat", "a dog"], settings)]

    expected = draw()
    graphed(pipe.unet)
    assert all(map(torch.equal, draw(), expected))
    # the first call of the form runs as it is; each picture's text is projected once
    did = pipe.unet.forward.capture
    assert (did.captured, did.replayed, did.projected) == (1, 2 * 4 - 1, 2)


def test_sdxl_and_a_transformer_are_captured(tmp_path, tiny_pipeline):
    import tiny_transformers

    for make in (tiny_pipelines.sdxl, tiny_transformers.sd3):
        pipe = dgq.load(make(tmp_path / make.__name__), device="cpu", graph=False)
        network = network_of(pipe)
        settings = Settings(steps=3, guidance=3.0, seed=1)
        expected = generate(pipe, ["a cat"], settings)[0].latents
        graphed(network)
        torch.testing.assert_close(generate(pipe, ["a cat"], settings)[0].latents, expected)
        assert captures(network) == 1
        assert network.forward.capture.replayed


def test_another_attention_backend_has_its_graph(tmp_path, monkeypatch):
    import tiny_transformers

    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    pipe = dgq.load(tiny_transformers.flux(tmp_path / "flux"), device="cpu", graph=False)
    network = graphed(network_of(pipe))
    settings = Settings(steps=3, guidance=3.0, seed=1)
    latents = []
    for backend, captured in ((None, 1), ("_native_math", 2), (None, 3)):
        if backend is None:
            network.reset_attention_backend()
        else:
            network.set_attention_backend(backend)
        latents.append(generate(pipe, ["a cat"], settings)[0].latents)
        assert captures(network) == captured
    with attention_backend("native"):
        generate(pipe, ["a cat"], settings)
    assert captures(network) == 3  # as at first
    for others in latents[1:]:
        torch.testing.assert_close(others, latents[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_each_form_of_a_call_has_its_graph(unet):
    check(unet, 1)
    check(unet, 1, return_dict=True)  # another form: the argument is given
    check(unet, 1, encoder_hidden_states=torch.randn(2, 9, 32))
    first, second = unet(**call(0)).sample, unet(**call(1)).sample
    assert not torch.equal(first, second)
    assert torch.equal(first, unet(**call(0)).sample)  # not overwritten
    for size in (4, 8, 12, 16, 20):  # a form that was forgotten is captured again
        for _ in range(2):
            unet(**call(0, size=size))
    assert len(unet.forward.known) == graphs.KEPT


class Shifted(torch.nn.Module):
    """Keeps what it made of a width for the latest 6 alone, as Qwen-Image its RoPE of 128 sizes."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.made = inner, []
        self.shift = functools.lru_cache(6)(self.make)

    def make(self, width):
        self.made.append(width)
        return torch.full((1, 1, 1, width), 0.5)

    def forward(self, x):
        return self.inner(x) + self.shift(x.shape[-1])


@torch.no_grad()
def test_what_is_kept_for_the_latest_forms_alone_is_not_read_later(unet, monkeypatch):
    monkeypatch.setattr(graphs, "AGE", 4)
    unet.conv_in = Shifted(unet.conv_in)
    often = call()
    for width in range(12, 44, 4):
        for _ in range(2):
            unet(**often)
        unet(**{**often, "sample": torch.zeros(2, 4, 4, width)})
    unet.conv_in.shift(8)
    assert unet.conv_in.made.count(8) == 1  # what the graphs read was there all the time
    assert captures(unet) == 2


@torch.no_grad()
def test_a_timestep_may_be_a_number_and_arguments_positional(unet):
    given = call()
    expected = unet.forward.plain(**given).sample
    for time in (100, 100.0, torch.tensor([100, 100])):
        for _ in range(3):
            (got,) = unet(given["sample"], time, given["encoder_hidden_states"], return_dict=False)
            assert torch.equal(got, expected)
        different = time + 100 if isinstance(time, torch.Tensor) else type(time)(200)
        later = unet(given["sample"], different, given["encoder_hidden_states"], return_dict=False)[0]
        assert not torch.equal(later, expected)
    assert captures(unet) == 3  # int64, float32, a row for each sample


@torch.no_grad()
def test_the_text_is_projected_when_it_is_another(unet):
    given = call()
    for _ in range(2):
        unet(**given)
    did = unet.forward.capture

    def compare(projected):
        before = did.projected
        assert torch.equal(unet(**given).sample, unet.forward.plain(**given).sample)
        assert did.projected - before == projected

    compare(0)
    given["sample"] = torch.randn_like(given["sample"])
    compare(0)
    given["encoder_hidden_states"] = torch.randn_like(given["encoder_hidden_states"])
    compare(1)
    compare(0)
    given["encoder_hidden_states"].mul_(2)  # in place
    compare(1)
    with torch.inference_mode():
        given["encoder_hidden_states"] = given["encoder_hidden_states"] * 1
    compare(1)
    compare(1)  # such a tensor does not tell its changes
    kept = unet.forward.known[next(iter(unet.forward.known))].kept
    assert any(x and isinstance(x[0], list) for x in kept), "nothing else keeps what was projected"


def test_captured_in_inference_mode_and_called_without(unet):
    with torch.inference_mode():
        check(unet, 1)
    check(unet, 0)
    with torch.no_grad():
        assert not unet(**call()).sample.is_inference()
    with torch.inference_mode():
        check(unet, 0)


def test_adapters_come_change_and_go(unet):
    check(unet, 1)
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 4, "init_lora_weights": False, "target_modules": ["to_q", "to_v"]}
    unet.add_adapter(peft.LoraConfig(**options), "one")
    check(unet, 1)
    unet.set_adapters(["one"], [0.5])
    check(unet, 1)
    unet.add_adapter(peft.LoraConfig(**options), "two")
    unet.set_adapters(["one", "two"], [0.5, 0.7])
    check(unet, 1)
    unet.disable_adapters()
    check(unet, 1)
    unet.enable_adapters()
    check(unet)
    for module in unet.modules():  # loaded in place, as a hot swap does
        if hasattr(module, "lora_A"):
            torch.nn.init.normal_(module.lora_A["one"].weight)
    check(unet, 0)
    unet.delete_adapters("two")
    unet.add_adapter(peft.LoraConfig(**options), "two")  # another one of its name
    unet.set_adapters(["one", "two"], [0.5, 0.7])
    check(unet, 1)
    unet.unload_lora()
    check(unet)


def test_tuned_scales_and_their_experts(tiny_checkpoint, tmp_path):
    from dgq.tuning.apply import attach
    from dgq.tuning.file import Base, Description, Subject, Tuned, content_hash
    from dgq.tuning.layout import Layout

    pipe = dgq.load(tiny_checkpoint, device="cpu")
    unet = graphed(pipe.unet)
    check(unet, 1)
    layout = Layout.of(unet, True)
    vectors = torch.randn(2, layout.size, generator=torch.Generator().manual_seed(0)) * 0.1
    about = Description(Base("tiny", "", content_hash(unet)), 2, 1000, True, [Subject("a cat", 3)], 5)
    attach(pipe, "one", Tuned(about, vectors))

    @torch.no_grad()
    def compare(times):
        for time in times:
            given = {**call(), "timestep": torch.tensor(time)}
            got = unet(**given).sample  # its hook gives the layers the expert's scales
            assert torch.equal(got, unet.forward.plain(**given).sample)
        return got

    tuned = compare([900, 100, 901, 101, 902, 102])
    before = captures(unet)
    assert before == 3  # without, and each expert
    compare([900, 100, 400, 600])
    assert captures(unet) == before
    dgq.set_tuned(pipe, {"one": 0.5})
    assert not torch.equal(compare([900, 101, 901, 102]), tuned)
    dgq.unload_tuned(pipe)
    check(unet)


def test_processors_freeu_and_modules_that_were_exchanged(unet):
    check(unet, 1)
    before = unet.attn_processors
    unet.set_attn_processor(AttnProcessor2_0())
    check(unet, 1)
    unet.set_attn_processor(before)
    check(unet)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    check(unet, 1)
    unet.disable_freeu()
    check(unet)
    unet.conv_out = copy.deepcopy(unet.conv_out)
    with torch.no_grad():
        unet.conv_out.weight.mul_(2)
    check(unet, 1)
    unet.conv_in.weight.data = unet.conv_in.weight.data * 2
    check(unet, 1)
    unet.conv_in.weight = torch.nn.Parameter(unet.conv_in.weight.detach() * 2)
    check(unet, 1)
    unet.conv_in.bias = None
    check(unet, 1)
    layer = unet.mid_block.resnets[0].conv1
    layer.weight_scale = torch.nn.Parameter(layer.weight_scale * 2, requires_grad=False)
    check(unet, 1)
    layer.weight_scale.data = layer.weight_scale.data / 2
    check(unet, 1)
    layer.restore()
    layer.set_stored(layer._stored_name, layer.stored_tensor().clone().flip(0))
    layer.prepare(torch.device("cpu"))
    check(unet, 1)


def told(caplog):
    return [record.message.partition("graph: ")[2] for record in caplog.records if record.name == "dgq.graphs"]


@pytest.mark.parametrize("offloading", [False, True])
def test_hooks_are_called_each_time(unet, caplog, offloading):
    check(unet, 1)
    calls = []
    if offloading:
        add_hook_to_module(unet.mid_block.resnets[0], ModelHook())
        hook = unet.mid_block.resnets[0]._hf_hook
        hook.post_forward = lambda module, output: calls.append(1) or output
    else:
        unet.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.WARNING):
        check(unet, 0)
    assert len(calls) == 8
    assert len(told(caplog)) == 1


def test_what_a_graph_cannot_hold_runs_as_it_is(unet, caplog):
    with caplog.at_level(logging.WARNING):
        unet.train()
        check(unet, 0)
        unet.eval()
        check(unet, 0, cross_attention_kwargs={"scale": object()})
        unet._hf_hook = None  # what accelerate's offloading leaves
        check(unet, 0)
        del unet._hf_hook

        class Own(AttnProcessor2_0):
            pass

        processors = unet.attn_processors
        unet.set_attn_processor(Own())
        check(unet, 0)
        unet.set_attn_processor(processors)
    reasons = told(caplog)
    assert len(reasons) == 4, reasons
    with torch.enable_grad():  # as training wants it
        given = call()
        given["sample"].requires_grad_()
        unet(**given).sample.sum().backward()
        assert given["sample"].grad is not None
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        unet.forward.capture = failing = Failing()
        check(unet, 1)
    assert failing.captured == 1  # it is not tried again
    assert told(caplog) == ["a call could not be captured (no such operation)"]


class Failing(Traced):
    def __call__(self, run, pool):
        self.captured += 1
        raise RuntimeError("no such operation\nwith more lines")


def test_captures_of_a_pool_share_a_stream_of_its_device(monkeypatch):
    """torch's own stream for captures stays on the first device that captured anything."""
    current, taken = [0], []

    @contextlib.contextmanager
    def graph(captured, pool, stream=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"  # threads that draw on other devices go on
        taken.append((pool, stream))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: (object(), current[0]))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    pools = [graphs.Pool(), graphs.Pool()]
    for current[0] in (0, 0, 1):
        graphs.capture(lambda: None, pools[current[0]])
    assert taken[0] == taken[1] != taken[2]
    assert [stream[1] for _, stream in taken] == [0, 0, 1]


def test_a_capture_that_fails_leaves_the_stream_and_the_next_one(monkeypatch):
    """torch's context does not set the stream back where the capture cannot be ended (torch/cuda/graphs.py)."""
    now = ["the caller's"]

    class Graph:
        def __init__(self, captured, pool, stream, **options):
            self.stream = stream

        def __enter__(self):
            self.before, now[0] = now[0], self.stream

        def __exit__(self, kind, *_):
            if kind:
                raise RuntimeError("operation failed due to a previous error during capture")
            now[0] = self.before

    @contextlib.contextmanager
    def stream(wanted):
        before, now[0] = now[0], wanted
        try:
            yield
        finally:
            now[0] = before

    for name, stand_in in {
        "CUDAGraph": lambda: SimpleNamespace(replay=None),
        "graph": Graph,
        "Stream": lambda: "its own",
        "graph_pool_handle": object,
        "current_stream": lambda: now[0],
        "stream": stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.capture(lambda: 1 / 0, graphs.Pool())
    assert now == ["the caller's"]
    assert graphs.capture(lambda: now[0], graphs.Pool())[1] == "its own"
    assert now == ["the caller's"]


def test_copies_and_pickles_have_their_own_graphs(unet):
    check(unet, 1)
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert other.forward.network is other
        with torch.no_grad():
            other.conv_out.weight.mul_(2)
            assert not torch.equal(other(**call()).sample, unet(**call()).sample)
        check(other, 1)


def test_a_network_goes_with_its_pipeline(tiny_pipeline):
    """As without graphs: `del pipe` and `torch.cuda.empty_cache()` give its memory back."""
    pipe = dgq.load(tiny_pipeline, device="cpu")
    check(graphed(pipe.unet), 1)
    gone = weakref.ref(pipe.unet)
    gc.collect()
    gc.disable()
    try:
        del pipe
        assert gone() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_torch_compile_looks_through(unet):
    expected = unet.forward.plain(**call(), return_dict=False)[0]
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for _ in range(3):
        assert torch.equal(compiled(**call(), return_dict=False)[0], expected)
    assert captures(unet) == 0


def test_loading_uses_them_on_cuda_alone(tiny_checkpoint):
    pipe = dgq.load(tiny_checkpoint, device="cpu")
    assert "forward" not in pipe.unet.__dict__
    dgq.use_graphs(pipe)
    dgq.use_graphs(pipe.unet)  # once is enough
    assert isinstance(pipe.unet.forward, Graphs)
    check_eager = pipe.unet(**call()).sample
    assert not pipe.unet.forward.known  # on the CPU there are none
    dgq.use_graphs(pipe, False)
    assert torch.equal(pipe.unet(**call()).sample, check_eager)
    assert "forward" not in pipe.unet.__dict__


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@torch.no_grad()
def test_replays_on_a_device(tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("DGQ_BACKEND", "")
    unet = dgq.load(tiny_checkpoint, device="cuda").unet
    assert isinstance(unet.forward, Graphs)
    for seed in range(4):
        given = {name: value.to("cuda", unet.dtype) for name, value in call(seed).items()}
        assert torch.equal(unet(**given).sample, unet.forward.plain(**given).sample)
    assert sum(entry is not None for entry in unet.forward.known.values()) == 1
