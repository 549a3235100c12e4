"""Devices and pipelines that dgq can work with, and those it refuses before anything is loaded."""

import pytest
import torch

import dgq
from dgq.errors import DgqError
from dgq.pipelines import check_device, default_device


@pytest.mark.parametrize("device", ["", "xyz", "mps", "meta", "CPU", " cpu", "cpu:3", "cuda:", "cuda:1e9", 0])
def test_devices_that_are_none(device):
    with pytest.raises(DgqError, match="is not cpu, cuda or cuda:N"):
        check_device(device)


def test_devices():
    assert check_device(None) == default_device()
    assert check_device("cpu") == check_device(torch.device("cpu")) == torch.device("cpu")
    count = torch.cuda.device_count()
    with pytest.raises(DgqError, match="no CUDA device: torch .* sees none" if not count else "torch sees"):
        check_device(f"cuda:{count}")
    if count:
        assert check_device("cuda:0") == torch.device("cuda", 0)


def test_a_device_is_checked_before_the_model(tmp_path):
    with pytest.raises(DgqError, match="'xyz' is not cpu"):
        dgq.load(tmp_path / "nosuch", device="xyz")
