"""diffusers integration: `from_pretrained` of a dgq checkpoint, after `import dgq`.

diffusers has no public way to register a quantization method; both of its tables are extended here.

diffusers asks the quantizer once it has built the network and read its weights: what it cannot read (a truncated file)
or build (a configuration that claims any size) ends in its own errors, and other components load by its own rules.
`dgq.load` checks all of that before.
"""

from __future__ import annotations

import copy
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from ..errors import DgqError
from ..integer.layer import IntegerLayer
from ..integer.shared_input import prepare_all
from ..integer.skeleton import stored_names
from .apply import apply_header
from .header import QUANT_METHOD, Header
from .reading import verify_tensors, weights_place
from .values import verify_values


class DgqMethod(StrEnum):
    """diffusers asks the quantization method for `.value`, so it has to be an Enum member."""

    DGQ = QUANT_METHOD


class DgqConfig(QuantizationConfigMixin):
    """`quantization_config` of a dgq checkpoint as diffusers hands it around; see `checkpoint.Header`."""

    def __init__(self, **fields: Any) -> None:
        try:
            self.header = Header.from_dict(fields)
        except DgqError as error:  # diffusers does not say which folder it reads
            raise DgqError(f"config.json: {error.message}", error.hint) from None
        self.quant_method: Any = DgqMethod.DGQ

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.header.to_dict())

    def __repr__(self) -> str:
        return f"DgqConfig({self.header.recipe.label}, {len(self.header.method.layers(self.header))} layers)"


class DgqQuantizer(DiffusersQuantizer):
    """Swaps a model's layers for packed ones before its weights are loaded, and checks every tensor."""

    # no conversion happens at load time: only checkpoints made by `dgq calibrate` can be loaded
    requires_calibration = True
    # diffusers may read shards in threads and sets dtypes meanwhile; one file needs no threads
    supports_parallel_loading = False

    quantization_config: DgqConfig

    def __init__(self, quantization_config: DgqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: list[Path] = []
        self._kept: set[str] = set()

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._files = [Path(file) for file in checkpoint_files]
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            apply_header(model, self.quantization_config.header, self._files[0].parent / "config.json")
        verify_tensors(self._files, model)
        # tensors that quantized layers brought along keep their stored dtype whatever torch_dtype is asked for
        self._kept = stored_names(model) | (set(model.state_dict()) - set(dict(model.named_parameters())))
        model.config["quantization_config"] = self.quantization_config

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        verify_values(weights_place(self._files), model)
        # Packed now, torch.compile finds nothing to do before a first call; where there is CUDA the model will move.
        if not torch.cuda.is_available() and {weight.device.type for weight in model.parameters()} == {"cpu"}:
            prepare_all(model, torch.device("cpu"))
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        return param_name in self._kept

    def create_quantized_param(  # type: ignore[override]
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: torch.device,
        state_dict: dict[str, Any], *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Set one tensor from the file; `param_value` has already been cast, so it is not used."""
        module_name, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        value = state_dict[param_name].to(device=target_device, dtype=getattr(module, leaf).dtype)
        if isinstance(module, IntegerLayer):
            module.set_stored(leaf, value)
        else:
            setattr(module, leaf, value)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Of what stands around integer layers, adapters say: they pass gradients on and learn nothing themselves."""
        return True


def register() -> None:
    """Teach diffusers the method "dgq"."""
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = DgqQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = DgqConfig
