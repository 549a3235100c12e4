"""diffusers' own tests of quantization backends, driven against dgq.

They come with diffusers' sources and not with its package: DGQ_DIFFUSERS_TESTS names a checkout of them (the
folder that holds its `tests`).
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import WIDTH, unet

from dgq import DgqConfig
from dgq.integer.layer import IntegerLayer
from dgq.integer.plan import quantizable
from dgq.integer.skeleton import SplitLayer

CHECKOUT = os.environ.get("DGQ_DIFFUSERS_TESTS")
if not CHECKOUT:
    pytest.skip("DGQ_DIFFUSERS_TESTS names no checkout of diffusers", allow_module_level=True)
sys.path.insert(0, CHECKOUT)
sys.modules.pop("tests", None)  # of this repository, where something has found it
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pytest.mark, "_config", None)  # they have marks of their own, which are not registered here
    SUITE = importlib.import_module("tests.models.testing_utils.quantization")


def _without_marks(mixin: Any) -> Any:
    """The class without its marks, one of which skips it where there is no accelerator."""
    return type(mixin.__name__, (), {key: value for key, value in vars(mixin).items() if key != "pytestmark"})


QUANTIZATION, COMPILE = (
    _without_marks(getattr(SUITE, name)) for name in ("QuantizationTesterMixin", "QuantizationCompileTesterMixin")
)
CONFIGS: dict[str, dict[str, Any]] = {
    "w8": {"wbits": 8},
    "w4": {"wbits": 4},
    "rotated": {"wbits": 8, "channels": "rotate"},
}
SMALLER = {"w8": 2.0, "w4": 2.5, "rotated": 2.0}  # of Flux, a third of whose weights are modulations that stay float


class Driver(QUANTIZATION, COMPILE):  # type: ignore[misc]
    """What the mixins ask of a backend and a model, for dgq."""

    modules_to_not_convert = ("to_k",)

    def __init__(self, folder: Path) -> None:
        self.pretrained_model_name_or_path = str(folder)

    def _create_quantized_model(self, config_kwargs: dict[str, Any], **extra: Any) -> Any:
        return self.model_class.from_pretrained(
            self.pretrained_model_name_or_path, quantization_config=DgqConfig(**config_kwargs), **extra
        )

    def _verify_if_layer_quantized(self, name: str, module: Any, config_kwargs: dict[str, Any]) -> None:
        assert isinstance(module, IntegerLayer | SplitLayer) or name in self.kept, name


class Flux(Driver):
    def __init__(self, folder: Path) -> None:
        from diffusers import FluxTransformer2DModel

        super().__init__(folder)
        self.model_class = FluxTransformer2DModel
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=[4, 4, 8],
        )
        model.save_pretrained(folder)
        self.kept = quantizable(model)[1]

    def get_dummy_inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        return {
            "hidden_states": torch.randn(1, 16, 4, generator=generator),
            "encoder_hidden_states": torch.randn(1, 24, WIDTH, generator=generator),
            "pooled_projections": torch.randn(1, WIDTH, generator=generator),
            "img_ids": torch.rand(16, 3, generator=generator),
            "txt_ids": torch.rand(24, 3, generator=generator),
            "timestep": torch.ones(1),
        }


class Unet(Driver):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        model = unet()
        self.model_class = type(model)
        model.save_pretrained(folder)
        self.kept = quantizable(model)[1]

    def get_dummy_inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        return {
            "sample": torch.randn(2, 4, 8, 8, generator=generator),
            "timestep": torch.tensor(10),
            "encoder_hidden_states": torch.randn(2, 24, WIDTH, generator=generator),
        }


@pytest.fixture(scope="module", params=[Unet, Flux])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    made: Driver = request.param(tmp_path_factory.mktemp("float"))
    return made


def checks(mixin: Any) -> list[str]:
    return [name for name in vars(mixin) if name.startswith("_test_")]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("check", checks(QUANTIZATION))
def test_quantization(driver: Driver, check: str, config: str, tmp_path: Path) -> None:
    method = getattr(driver, check)
    given = {
        "config_kwargs": CONFIGS[config],
        "tmp_path": tmp_path,
        "modules_to_not_convert": list(driver.modules_to_not_convert),
        "expected_memory_reduction": SMALLER[config],
    }
    method(**{name: given[name] for name in inspect.signature(method).parameters if name in given})


def test_shards(driver: Driver, tmp_path: Path) -> None:
    driver._test_quantization_serialization(CONFIGS["w8"], tmp_path, max_shard_size="auto")


@pytest.mark.parametrize("config", ["w8", "w4"])
@pytest.mark.parametrize("check", checks(COMPILE))
def test_compiling(
    driver: Driver, check: str, config: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # what an interrupted process left in the user's cache may be half written
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))
    driver.setup_method()
    getattr(driver, check)(CONFIGS[config])
    torch.compiler.reset()
