"""transformers integration: what `dgq.checkpoint.diffusers` does for the networks of diffusers, for text encoders.

transformers asks its own quantizers. It reads the packed layers' tensors by their names, as it does all others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from ..errors import DgqError
from ..integer.dequantize import dequantize
from ..integer.layer import IntegerLayer
from ..integer.on_the_fly import Arrivals, plan_without_data
from ..integer.plan import Layer
from ..integer.skeleton import SplitLayer, fuse
from . import checksums
from .apply import apply_header
from .diffusers import DgqConfig, check_asked, made_header, prepare_where_it_stays, save_pretrained
from .header import QUANT_METHOD
from .reading import verify_tensors, weights_place
from .values import verify_values


class DgqEncoderQuantizer(HfQuantizer):
    """Loads the packed layers of a checkpoint's text encoder, every tensor checked, or quantizes a float one's as they
    are read."""

    quantization_config: DgqConfig  # type: ignore[assignment]

    def __init__(self, quantization_config: DgqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)  # type: ignore[arg-type]
        check_asked(quantization_config, self.pre_quantized)
        self._files: list[Path] = []
        self._layers: list[Layer] = []
        self._arrivals: Arrivals | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise DgqError("device_map puts quantized layers of a text encoder on the disk", "leave it out")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self._arrivals is not None and self._arrivals.expects(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        assert self._arrivals is not None
        return _Arrival(self._arrivals)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._files = [Path(file) for file in kwargs["checkpoint_files"]]
        header, config = self.quantization_config.header, self.quantization_config
        if header is None:
            self._layers = plan_without_data(model, config.recipe, config.modules_to_not_convert)
            self._arrivals = Arrivals(model, self._layers)
        else:
            if checksums.wanted():
                checksums.verify(self._files[0].parent)
            with torch.device("meta"):
                apply_header(model, header, self._files[0].parent / "config.json")
            verify_tensors(self._files, model)
        for part in _models(model):
            part._init_weights = functools.partial(_init_weights, part)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for part in _models(model):
            del part._init_weights
        # names stay those of the layers: what older files call them otherwise is not restored where it is saved
        model._weight_conversions = []
        for module in model.modules():
            if isinstance(module, IntegerLayer):
                module.requires_grad_(False)
        if self._arrivals is not None:
            header = made_header(model, self.quantization_config, self._layers, self._files[0].parent)
            fuse(model)
            self.quantization_config = model.config.quantization_config = DgqConfig.of(header)
            self._layers, self._arrivals = [], None
        verify_values(weights_place(self._files), model)
        model.save_pretrained = functools.partial(_save_pretrained, model)
        prepare_where_it_stays(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Plain layers with the float weights that the integers stand for, of the model's dtype: of its configuration
        transformers may have made a text."""
        dequantize(model, dtype if isinstance(dtype, torch.dtype) else model.dtype)
        for name in ("to", "save_pretrained"):
            model.__dict__.pop(name, None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Of adapters around integer layers, which pass gradients on and learn nothing themselves."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class _Arrival(ConversionOps):
    """Hands tensors of a float layer on as they are read; there is nothing left for transformers to set."""

    def __init__(self, arrivals: Arrivals) -> None:
        self.arrivals = arrivals

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *args: Any, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            self.arrivals.take(name, tensor, tensor.device)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


def _models(model: nn.Module) -> Iterator[Any]:
    return (part for part in model.modules() if isinstance(part, PreTrainedModel))


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> None:
    save_pretrained(model, *args, **kwargs)


_save_pretrained.__wrapped__ = PreTrainedModel.save_pretrained  # type: ignore[attr-defined]


def _init_weights(model: Any, module: nn.Module) -> None:
    """As the class does, but for quantized layers and what holds them: nothing of them is to be drawn, and packed
    weights are no floats. What no file holds, such as the numbers of positions, is made there."""
    if not any(isinstance(part, IntegerLayer | SplitLayer) for part in (module, *module.children())):
        type(model)._init_weights(model, module)


def register() -> None:
    """Teach transformers the method "dgq"."""
    mapping: Any = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    mapping[QUANT_METHOD] = DgqConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = DgqEncoderQuantizer
