"""Calls kept and replayed."""

import pytest
import torch
from torch import nn

from dgq.replay import hooked, pack_calls, predicted, record_inputs, replay, unpack_calls


def test_packed_calls_are_those_that_were_given():
    shared = torch.randn(2, 3)
    calls = [
        {"sample": torch.randn(1, 4), "cond": {"text": shared, "none": None}, "context": shared, "scale": 1.5},
        {"sample": torch.randn(1, 4).t(), "cond": {"text": shared}, "parts": [shared, shared], "shapes": [[(1, 4, 4)]]},
    ]
    packed = pack_calls(calls)
    assert len(packed) == 4  # two samples, what is shared, the form
    assert len({tensor.data_ptr() for tensor in packed.values()}) == len(packed)  # a file may not share
    assert all(tensor.is_contiguous() for tensor in packed.values())
    for call, again in zip(calls, unpack_calls(packed), strict=True):
        assert set(again) == set(call)
        assert torch.equal(again["sample"], call["sample"])
        assert torch.equal(again["cond"]["text"], shared)
        assert again["cond"].get("none") is None
    assert all(torch.equal(*pair) for pair in zip(unpack_calls(packed)[1]["parts"], calls[1]["parts"], strict=True))
    assert unpack_calls(packed)[1]["shapes"] == [[[1, 4, 4]]]
    with pytest.raises(KeyError):
        unpack_calls({"0": shared})
    with pytest.raises(ValueError, match="Expecting value"):
        unpack_calls({"form": torch.zeros(3, dtype=torch.uint8)})


def test_calls_are_recorded_whole_but_for_the_kind_of_their_result():
    class Network(nn.Module):
        def forward(self, sample, parts, shapes, return_dict=True):
            return sample

    network, x = Network(), torch.zeros(2)
    run = lambda *_: (network(sample=x, parts=[x], shapes=[(1, 2)], return_dict=False), x.add_(1))  # noqa: E731
    (call,) = record_inputs(run, network, ["a cat"])[0]
    assert {name: value for name, value in call.items() if name not in ("sample", "parts")} == {"shapes": [(1, 2)]}
    assert torch.equal(call["parts"][0], torch.zeros(2))  # not what became of it


def test_calls_share_what_stays_the_same_from_step_to_step():
    class Network(nn.Module):
        def forward(self, sample, text, return_dict=True):
            return sample

    network, texts = Network(), torch.arange(6.0).view(3, 1, 2)  # of two prompts and of none

    def run(prompt, i):
        for step in range(2):
            for text in (texts[i].clone(), texts[2].half()):
                network(sample=torch.full((2,), i + step / 2), text={"embedding": text})

    recorded = record_inputs(run, network, ["a cat", "a dog"])
    kept = [[call["text"]["embedding"] for call in calls] for calls in recorded]
    for i, calls in enumerate(kept):
        assert calls[0] is calls[2]
        assert calls[1] is calls[3]
        assert all(torch.equal(calls[j], (texts[i], texts[2].half())[j % 2]) for j in range(4))
    assert kept[0][1] is kept[1][1]
    samples = [call["sample"] for calls in recorded for call in calls]
    assert [sample[0].item() for sample in samples] == [0, 0, 0.5, 0.5, 1, 1, 1.5, 1.5]


def test_samples_in_a_list_are_stacked():
    network = nn.Module()
    network.forward = lambda x, return_dict: ([x, x + 1],)
    assert torch.equal(predicted(network, {"x": torch.zeros(3)}), torch.stack([torch.zeros(3), torch.ones(3)]))


def test_hooks_go_with_the_replay_also_where_it_fails():
    network = nn.Linear(3, 2)
    seen, told = [], []

    def hook(module, args, kwargs, output):
        assert not torch.is_grad_enabled()
        seen.append(output.shape)

    replay(
        network,
        [{"input": torch.ones(n, 3)} for n in (1, 2)],
        [network.register_forward_hook(hook, with_kwargs=True)],
        lambda *args: told.append(args),
    )
    assert (seen, told) == ([(1, 2), (2, 2)], [(1, 2), (2, 2)])
    with pytest.raises(RuntimeError):
        replay(network, [{"input": torch.ones(1, 4)}], [network.register_forward_hook(hook)], print)
    assert not network._forward_hooks
    with pytest.raises(KeyError), hooked([network.register_forward_hook(hook)]):
        raise KeyError
    assert not network._forward_hooks
