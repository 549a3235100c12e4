"""A whole quantized UNet on the Triton path equals the CPU path, and compiles in one graph."""

import torch

from dgq_kernels import backend, native


def unet_and_call(folder):
    import dgq

    unet = dgq.load(folder).unet
    g = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=g)
    context = torch.randn(2, 24, 32, generator=g)
    return unet, (sample, torch.tensor(500), context)


@torch.no_grad()
def test_a_unet_on_triton_equals_the_cpu(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(native, "attention_pays", lambda: True)  # without AVX512 the CPU would attend in float
    unet, call = unet_and_call(tiny_checkpoint)
    expected = unet(*call).sample
    monkeypatch.setenv("DGQ_BACKEND", "triton")
    unet, call = unet_and_call(tiny_checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    got = unet.to(device)(*(x.to(device) for x in call)).sample.cpu()
    # a float in the last digit may move a code by one step
    assert float((got - expected).norm() / expected.norm()) < 5e-3


@torch.no_grad()
def test_compiles_in_one_graph(tiny_checkpoint, monkeypatch):
    """No graph break, hence no value read back by the host; under fake tensors nothing is computed either."""
    monkeypatch.setenv("DGQ_BACKEND", "triton")
    assert backend.select(torch.device("cpu")) == "triton"
    unet, call = unet_and_call(tiny_checkpoint)
    block = unet.down_blocks[0]
    x, context = torch.randn(2, 32, 8, 8), call[2]
    time = torch.randn(2, unet.time_embedding.linear_2.out_features)
    block(x, time, encoder_hidden_states=context)  # layers pack their weights at the first call
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=keep, fullgraph=True)
    got = compiled(x, time, encoder_hidden_states=context)[0]
    torch.testing.assert_close(got, block(x, time, encoder_hidden_states=context)[0], rtol=1e-4, atol=1e-4)
    (graph,) = graphs
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert any("dgq" in name and "conv2d" in name for name in called)
    assert any("dgq" in name and "log_attention" in name for name in called)
    methods = {node.target for node in graph.graph.nodes if node.op == "call_method"}
    assert not methods & {"item", "tolist", "cpu", "numpy", "nonzero"}
