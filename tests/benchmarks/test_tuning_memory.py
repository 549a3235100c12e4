"""The prediction of a tuning step's memory: it runs, and what it says of the peak adds up to the peak."""

import dataclasses

import pytest
from tiny_pipelines import unet

from benchmarks import tuning_memory


@pytest.fixture
def small(monkeypatch):
    real = tuning_memory.ARCHITECTURES["sd-v1.4"]
    config = dict(unet(sample_size=32).config)
    monkeypatch.setitem(tuning_memory.ARCHITECTURES, "sd-v1.4", dataclasses.replace(real, config=config))


def test_checkpointing_needs_less_and_parts_add_up(small):
    found = {
        (system, checkpointing): tuning_memory.measure(system, 4, checkpointing, 10**6)
        for system, checkpointing in (("dgq", "dgq"), ("dgq", "none"), ("lora", "diffusers"), ("lora", "dgq"))
    }
    for one in found.values():
        parts = sum(float(line.split(" MiB")[0]) for line in one["largest"])
        assert parts == pytest.approx(one["above_unet_mib"], abs=0.05 * len(one["largest"]))
        assert 0 < one["of_that_kept_mib"] < one["above_unet_mib"]
    peaks = {key: one["above_unet_mib"] for key, one in found.items()}
    assert peaks["dgq", "dgq"] < 0.6 * peaks["dgq", "none"]
    assert peaks["lora", "dgq"] < peaks["lora", "diffusers"]
