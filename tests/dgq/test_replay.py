"""Calls kept and replayed."""

import pytest
import torch
from torch import nn

from dgq.replay import hooked, pack_calls, replay, unpack_calls


def test_packed_calls_are_those_that_were_given():
    shared = torch.randn(2, 3)
    calls = [
        {"sample": torch.randn(1, 4), "cond": {"text": shared, "none": None}, "context": shared, "return_dict": False},
        {"sample": torch.randn(1, 4).t(), "cond": {"text": shared}, "context": shared},
    ]
    packed = pack_calls(calls)
    assert len({tensor.data_ptr() for tensor in packed.values()}) == len(packed)  # a file may not share
    assert all(tensor.is_contiguous() for tensor in packed.values())
    for call, again in zip(calls, unpack_calls(packed), strict=True):
        assert set(again) == {"sample", "cond", "context"}
        assert torch.equal(again["sample"], call["sample"])
        assert torch.equal(again["cond"]["text"], shared)
    for wrong in ("sample", "x/sample/", "0/a/b/c"):
        with pytest.raises(ValueError):  # noqa: PT011 (of int() and of unpacking)
            unpack_calls({wrong: shared})


def test_hooks_go_with_the_replay_also_where_it_fails():
    network = nn.Linear(3, 2)
    seen, told = [], []

    def hook(module, args, kwargs, output):
        assert not torch.is_grad_enabled()
        seen.append(output.shape)

    replay(
        network, [{"input": torch.ones(n, 3)} for n in (1, 2)],
        [network.register_forward_hook(hook, with_kwargs=True)], lambda *args: told.append(args),
    )  # fmt: skip
    assert (seen, told) == ([(1, 2), (2, 2)], [(1, 2), (2, 2)])
    with pytest.raises(RuntimeError):
        replay(network, [{"input": torch.ones(1, 4)}], [network.register_forward_hook(hook)], print)
    assert not network._forward_hooks
    with pytest.raises(KeyError), hooked([network.register_forward_hook(hook)]):
        raise KeyError
    assert not network._forward_hooks
