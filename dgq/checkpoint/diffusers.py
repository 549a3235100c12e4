"""diffusers integration: `from_pretrained` of a dgq checkpoint, and of a float model with a `DgqConfig`, after
`import dgq`.

diffusers has no public way to register a quantization method; both of its tables are extended here.

diffusers asks the quantizer once it has built the network and read its weights: what it cannot read (a truncated file)
or build (a configuration that claims any size) ends in its own errors, and other components load by its own rules.
`dgq.load` checks all of that before.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import CustomDtype
from diffusers.hooks import _helpers as layer_skip
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    CustomDiffusionXFormersAttnProcessor,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    SlicedAttnProcessor,
)
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_sparsectrl import SparseControlNetModel
from diffusers.models.controlnets.controlnet_union import ControlNetUnionModel
from diffusers.models.controlnets.controlnet_xs import UNetControlNetXSModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets import unet_2d_condition
from diffusers.models.unets.unet_motion_model import UNetMotionModel
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from dgq_kernels import native

from ..errors import DgqError
from ..family import family_of
from ..integer.attention import AttentionPlan, LogAttnProcessor, is_plain, use_log_attention
from ..integer.dequantize import dequantize
from ..integer.fused_unet import FusedTransformerBlock
from ..integer.layer import IntegerLayer
from ..integer.on_the_fly import Arrivals, plan_without_data
from ..integer.plan import Layer
from ..integer.shared_input import prepare_all
from ..integer.skeleton import BLOCK_NAMES, SplitLayer, fuse, stored_names
from ..recipe import Recipe
from ..version import __version__
from . import checksums
from .apply import apply_header
from .header import QUANT_METHOD, Header
from .reading import verify_tensors, weights_place
from .values import finite, verify_values


class DgqMethod(StrEnum):
    """diffusers asks the quantization method for `.value`, so it has to be an Enum member."""

    DGQ = QUANT_METHOD


class DgqConfig(QuantizationConfigMixin):
    """What diffusers hands around as `quantization_config`: what to make of a float model while it is loaded, or what a
    dgq checkpoint holds.

        UNet2DConditionModel.from_pretrained(folder, quantization_config=DgqConfig(wbits=8, abits=8))

    quantizes without calibration: weights to nearest with a searched range, activations dynamically. It is the integer
    recipe (`recipe.Recipe`) as far as that needs no data.

    Args:
        wbits: bits of the weights, 4 or 8.
        abits: bits of the activations, 4 to 8.
        channels: "none", or "rotate": every layer is rotated whose channels a block of 16, 64 or 256 divides.
        attention: "log" where the text begins with a start token (`family.Family.start_token`), or "float".
        weight_group: input channels that share an int4 sub-scale, 32 or 64.
        modules_to_not_convert: modules that stay float beside those that do in any case: names, parts of names between
            dots, or shell patterns of whole names.

    Attributes:
        recipe: the integer recipe asked for.
        header: of a quantized model; None before there is one.

    Raises:
        DgqError: a value that cannot be, or an argument that is none.
    """

    def __init__(
        self,
        wbits: int = 4,
        abits: int = 8,
        channels: str = "none",
        attention: str = "log",
        weight_group: int = 32,
        modules_to_not_convert: Sequence[str] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method: Any = DgqMethod.DGQ
        self.header: Header | None = None
        self.modules_to_not_convert: Sequence[str] = modules_to_not_convert or []
        if unknown:
            raise DgqError(
                f"DgqConfig has no argument {next(iter(unknown))!r}",
                f"it has {', '.join(_ASKED)}, modules_to_not_convert",
            )
        names = self.modules_to_not_convert
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise DgqError(f"DgqConfig: modules_to_not_convert {names!r} is no list of names")
        if channels not in ("none", "rotate"):
            raise DgqError(
                f"DgqConfig: channels {channels!r} is neither 'none' nor 'rotate'",
                "other ways to handle them need calibration: dgq calibrate",
            )
        asked = dict(zip(_ASKED, (wbits, abits, channels, attention, weight_group), strict=False))
        try:
            self.recipe = Recipe.from_dict({**asked, "rounding": "nearest"})
        except DgqError as error:
            raise DgqError(f"DgqConfig: {error.message}", error.hint) from None

    @classmethod
    def of(cls, header: Header) -> DgqConfig:
        """The configuration of a quantized model."""
        config = cls()
        config.header, config.recipe = header, header.recipe
        config.modules_to_not_convert = header.modules_to_not_convert
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From JSON: of a checkpoint's config.json, or of what is asked for.

        Raises:
            DgqError: a damaged header, or as the class.
        """
        if "format_version" in config_dict:
            try:
                config = cls.of(Header.from_dict(config_dict))
            except DgqError as error:  # diffusers does not say which folder it reads
                raise DgqError(f"config.json: {error.message}", error.hint) from None
        else:
            config = cls(**{key: value for key, value in config_dict.items() if key != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON: the header of a quantized model, else what was asked for."""
        if self.header is not None:
            return copy.deepcopy(self.header.to_dict())
        asked = {name: getattr(self.recipe, name) for name in _ASKED}
        return {"quant_method": QUANT_METHOD, **asked, "modules_to_not_convert": list(self.modules_to_not_convert)}

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without what is at its default; a header whole."""
        if self.header is not None:
            return self.to_dict()
        default = DgqConfig().to_dict()
        return {key: value for key, value in self.to_dict().items() if key == "quant_method" or value != default[key]}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DgqConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if self.header is not None:
            return f"DgqConfig({self.recipe.label}, {len(self.header.method.layers(self.header))} layers)"
        asked = {"wbits": self.recipe.wbits, "abits": self.recipe.abits, **self.to_diff_dict()}
        return f"DgqConfig({', '.join(f'{key}={value!r}' for key, value in asked.items() if key != 'quant_method')})"


_ASKED = ("wbits", "abits", "channels", "attention", "weight_group")  # of a recipe


def check_asked(config: DgqConfig, pre_quantized: bool) -> None:
    """Hold a configuration against what is loaded with it: a checkpoint, or a float model.

    Raises:
        DgqError: it is the other's.
    """
    if pre_quantized and config.header is None:
        raise DgqError(
            "config.json: quantization_config says what was asked for, and not what the weights are",
            "it belongs to no checkpoint: quantize the float model again",
        )
    if not pre_quantized and config.header is not None:
        raise DgqError(
            "the quantization_config is that of a checkpoint, and the model is a float one",
            "ask by DgqConfig(wbits=..., abits=...)",
        )


def made_header(model: Any, config: DgqConfig, layers: Sequence[Layer], folder: Path) -> Header:
    """The header of what was made of a float model, read from a folder, as a configuration asked."""
    inside = folder.name == family_of(model).component or (folder.parent / "model_index.json").is_file()
    return Header(
        config.recipe,
        {layer.name: layer.plan for layer in layers},
        base_model=(folder.parent if inside else folder).name,
        dgq_version=__version__,
        modules_to_not_convert=list(config.modules_to_not_convert),
    )


class DgqQuantizer(DiffusersQuantizer):
    """Loads the packed layers of a checkpoint, every tensor checked, or quantizes a float model's as they are read."""

    # diffusers may read shards in threads and sets dtypes meanwhile
    supports_parallel_loading = False
    use_keep_in_fp32_modules = True

    quantization_config: DgqConfig

    def __init__(self, quantization_config: DgqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        check_asked(quantization_config, self.pre_quantized)
        self._files: list[Path] = []
        self._kept: set[str] = set()
        self._dtype = torch.float32
        self._layers: list[Layer] = []
        self._arrivals: Arrivals | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """What goes to the disk is not seen here: a float weight would never be quantized, scales would be cast."""
        if not isinstance(device_map, dict) or "disk" not in device_map.values():
            return
        if not self.pre_quantized:
            raise DgqError(
                "device_map puts layers on the disk, where they cannot be quantized",
                "load and save the model without it first, then load the checkpoint with it",
            )
        if self._dtype != torch.float32:
            raise DgqError(
                f"device_map puts quantized layers on the disk, whose scales would become {self._dtype}",
                "leave the dtype out",
            )

    def update_torch_dtype(self, torch_dtype: Any) -> torch.dtype:
        self._dtype = torch_dtype or torch.float32
        return self._dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """What a float weight will take, for placing it."""
        if self.pre_quantized:
            return torch_dtype
        return torch.int8 if self.quantization_config.recipe.wbits == 8 else CustomDtype.INT4

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The parameters that take something else than `adjust_target_dtype` says."""
        if self.pre_quantized:
            return {name: value.dtype for name, value in model.named_parameters() if name in self._kept}
        weights = {f"{layer.plan.owner(layer.name)}.weight" for layer in self._layers}
        return {name: torch_dtype for name, _ in model.named_parameters() if name not in weights}

    def get_cuda_warm_up_factor(self) -> int:
        """Parameters by the bytes of the dtype that one will take."""
        values = 1 if self.pre_quantized else 8 // self.quantization_config.recipe.wbits
        return int(self._dtype.itemsize * values)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._files = [Path(file) for file in checkpoint_files]
        return loaded_keys

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        if missing_keys:
            raise DgqError(f"{weights_place(self._files)}: tensor {min(missing_keys)!r} is missing")
        return missing_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        header = self.quantization_config.header
        if header is None:
            config = self.quantization_config
            self._layers = plan_without_data(model, config.recipe, config.modules_to_not_convert)
            self._arrivals = Arrivals(model, self._layers)
            return
        if checksums.wanted():
            checksums.verify(self._files[0].parent)
        with torch.device("meta"):
            apply_header(model, header, self._files[0].parent / "config.json")
        verify_tensors(self._files, model)
        # tensors that quantized layers brought along keep their stored dtype whatever torch_dtype is asked for
        self._kept = stored_names(model) | (set(model.state_dict()) - set(dict(model.named_parameters())))
        model.config["quantization_config"] = self.quantization_config

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        if self._arrivals is None:
            verify_values(weights_place(self._files), model)
        else:
            self.quantization_config = DgqConfig.of(self._finish(model))
            model.config["quantization_config"] = self.quantization_config
            self._layers, self._arrivals = [], None
        _make_quantized(model)
        prepare_where_it_stays(model)
        return model

    def _finish(self, model: nn.Module) -> Header:
        """What was made of a float model: its blocks and attention as a checkpoint's are, and the header."""
        config = self.quantization_config
        header = made_header(model, config, self._layers, self._files[0].parent)
        if config.recipe.attention == "log" and family_of(model).start_token and is_plain(model):
            header.attention = AttentionPlan.for_activations(config.recipe.abits)
            use_log_attention(model, header.attention)
        fuse(model)
        return header

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        return param_name in self._kept if self._arrivals is None else self._arrivals.expects(param_name)

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Take one tensor from the file; `param_value` has already been cast, so it is not used."""
        stored = state_dict[param_name]
        if self._arrivals is not None:
            if not finite(stored):
                place = weights_place(self._files)
                raise DgqError(f"{place}: tensor {param_name!r} holds values that are not finite")
            self._arrivals.take(param_name, stored, torch.device(target_device))
            native.page_out(stored)
            return
        module_name, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        value = stored.to(device=target_device, dtype=getattr(module, leaf).dtype)
        if isinstance(module, IntegerLayer):
            module.set_stored(leaf, value)
        else:
            setattr(module, leaf, value)

    def _dequantize(self, model: Any) -> Any:
        """Plain layers of the model's dtype, with the float weights that the integers stand for."""
        dequantize(model, model.dtype)
        for name in (*_METHODS, *BLOCK_NAMES, "to", "_keep_in_fp32_modules", "quantization_method"):
            model.__dict__.pop(name, None)
        config = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = type(model.config)(config)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Of what stands around integer layers, adapters say: they pass gradients on and learn nothing themselves."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def stays(device: torch.device) -> bool:
    """Whether what is loaded to a device will run there; where there is CUDA, the model will move."""
    return device.type == "cpu" and not torch.cuda.is_available()


def prepare_where_it_stays(model: nn.Module) -> None:
    """Pack a loaded model's weights for the CPU, where all will run there: torch.compile then finds nothing to do
    before a first call."""
    if all(stays(weight.device) for weight in model.parameters()):
        prepare_all(model, torch.device("cpu"))
        native.give_back()


def _make_quantized(model: Any) -> None:
    """Let diffusers see the float model's dtype and number of parameters, those of quantized layers being others, and
    answer what a quantized model is asked otherwise.

    diffusers takes the first float parameter's dtype for the model's, but for the modules kept in float32.
    """
    in_float32 = []
    for name, module in model.named_modules():
        if isinstance(module, IntegerLayer):
            in_float32.append(f"{name}.")
        elif any(weight.is_floating_point() for weight in module.parameters(recurse=False)):
            break
    if in_float32:
        model._keep_in_fp32_modules = [*(model._keep_in_fp32_modules or ()), *in_float32]
    for name, method in _METHODS.items():
        if hasattr(model, name):
            setattr(model, name, functools.partial(method, model))


def _num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """`ModelMixin.num_parameters` of the float model; those of quantized layers are not trained."""
    own = int(type(model).num_parameters(model, only_trainable, exclude_embeddings))
    if only_trainable:
        return own
    for module in model.modules():
        if isinstance(module, IntegerLayer):
            stored = sum(weight.numel() for weight in module.parameters(recurse=False))
            own += module.plan.float_parameters - stored
    return own


def _fuse_qkv_projections(model: Any) -> None:
    raise DgqError(
        "a quantized model's queries, keys and values read one quantized input already: nothing is left to fuse",
        "leave fuse_qkv_projections out",
    )


def _fuse_lora(model: Any, *args: Any, **kwargs: Any) -> None:
    """As the class does, where no adapter is of a quantized layer: fused one by one, the float ones would be changed
    when the first of the others refuses."""
    if any(isinstance(getattr(module, "base_layer", None), IntegerLayer | SplitLayer) for module in model.modules()):
        raise DgqError(
            "an adapter cannot be fused into packed weights",
            "it works beside them; dgq calibrate --lora fuses it into the float model",
        )
    type(model).fuse_lora(model, *args, **kwargs)


def _attention_of(model: Any) -> AttentionPlan | None:
    """A quantized model's log attention, None where it is float. Its configuration does not tell: saving makes JSON of
    that in place."""
    plan: AttentionPlan | None = model.hf_quantizer.quantization_config.header.attention
    return plan


_IP_ADAPTERS = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
_CUSTOM_DIFFUSION = (
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    CustomDiffusionXFormersAttnProcessor,
)


def _set_attn_processor(model: Any, processor: Any) -> None:
    """As the class does. IP-Adapters that come and go hand over every other processor made anew by its class, and float
    attention for their own: both are the model's attention again.

    Raises:
        DgqError: Custom Diffusion's, which casts to the dtype of weights, where those are packed.
    """
    asked = processor.values() if isinstance(processor, dict) else (processor,)
    if any(isinstance(one, _CUSTOM_DIFFUSION) for one in asked) and any(
        not module.to_q.weight.is_floating_point() for module in model.modules() if hasattr(module, "to_q")
    ):
        raise DgqError(
            "Custom Diffusion computes in the dtype of the weights of to_q, which are packed integers",
            'keep them float: DgqConfig(modules_to_not_convert=["to_q"])',
        )
    made_anew = any(isinstance(one, LogAttnProcessor) and one.plan is None for one in asked)
    if made_anew and isinstance(processor, dict):
        own, before = LogAttnProcessor(_attention_of(model)), model.attn_processors
        processor = {
            name: own
            if isinstance(one, LogAttnProcessor)
            or (type(one) is AttnProcessor2_0 and isinstance(before.get(name), _IP_ADAPTERS))
            else one
            for name, one in processor.items()
        }
    type(model).set_attn_processor(model, processor)


def _set_attention_slice(model: Any, slice_size: Any = "auto") -> None:
    """As the class does; attention that is not sliced any more is the model's again."""
    sliced: list[Any] = [
        module for module in model.modules() if isinstance(getattr(module, "processor", None), SlicedAttnProcessor)
    ]
    type(model).set_attention_slice(model, slice_size)
    plan = _attention_of(model)
    if slice_size is None and plan is not None:
        own = LogAttnProcessor(plan)
        for module in sliced:
            module.set_processor(own)


class _State(OrderedDict[str, Tensor]):
    """A quantized model's `state_dict`. Asked for a quantized layer's float weight, which it does not hold, it gives
    the layer's integers in that shape: loaders of adapters look there for it.

    Attributes:
        model: whose state it is.
    """

    model: Callable[[], Any] | None = None

    def __missing__(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        model = None if self.model is None or leaf != "weight" else self.model()
        try:
            module = None if model is None else model.get_submodule(owner)
        except AttributeError:
            module = None
        module = getattr(module, "base_layer", module)
        if not isinstance(module, IntegerLayer | SplitLayer):
            raise KeyError(name)
        return module.weight

    def __reduce__(self) -> Any:
        """Files hold a plain one, which loads where dgq is not known."""
        plain: Any = OrderedDict(self)
        plain.__dict__.update({key: value for key, value in self.__dict__.items() if key != "model"})
        return plain.__reduce__()


def _state_dict(model: Any, *args: Any, **kwargs: Any) -> _State:
    plain = type(model).state_dict(model, *args, **kwargs)
    made = _State(plain)
    made.__dict__.update(vars(plain), model=weakref.ref(model))
    return made


def _adapter_file(name: str, model: Any, *args: Any, **kwargs: Any) -> Any:
    """As the class's method of this name, which loads or saves an adapter: of the packed weights in the `state_dict` it
    reads names and shapes, and asks more than once, so that none are made for it."""
    before = model.state_dict
    model.state_dict = functools.partial(_state_dict, model, keep_vars=True)
    try:
        return getattr(type(model), name)(model, *args, **kwargs)
    finally:
        model.state_dict = before


def save_pretrained(model: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
    """As the class does; then the checksums of what was written. One that is pushed as well goes without them."""
    type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)
    if is_main_process and os.path.isdir(save_directory):
        checksums.record(Path(save_directory))


# Pipelines look which arguments it takes. functools.wraps would give it another name, by which it cannot be pickled.
save_pretrained.__wrapped__ = ModelMixin.save_pretrained  # type: ignore[attr-defined]


# What a quantized model answers in its class's place.
_METHODS: dict[str, Callable[..., Any]] = {
    "num_parameters": _num_parameters,
    "save_pretrained": save_pretrained,
    "fuse_qkv_projections": _fuse_qkv_projections,
    "fuse_lora": _fuse_lora,
    "set_attn_processor": _set_attn_processor,
    "set_attention_slice": _set_attention_slice,
    "state_dict": _state_dict,
    "load_lora_adapter": functools.partial(_adapter_file, "load_lora_adapter"),
    "save_lora_adapter": functools.partial(_adapter_file, "save_lora_adapter"),
}


# Networks that are made of another's float weights, and the class method that copies them.
_COPIES: tuple[tuple[Any, str], ...] = (
    (UNetMotionModel, "from_unet2d"),
    (ControlNetModel, "from_unet"),
    (ControlNetUnionModel, "from_unet"),
    (SparseControlNetModel, "from_unet"),
    (UNetControlNetXSModel, "from_unet"),
)
# Those of transformers, by where they are: a process of the command line imports none.
_COPIES_OF_TRANSFORMERS = {
    "diffusers.models.controlnets.controlnet_flux": "FluxControlNetModel",
    "diffusers.models.controlnets.controlnet_hunyuan": "HunyuanDiT2DControlNetModel",
    "diffusers.models.controlnets.controlnet_qwenimage": "QwenImageControlNetModel",
    "diffusers.models.controlnets.controlnet_sd3": "SD3ControlNetModel",
}


def _refuse_to_copy(kind: Any, name: str) -> None:
    """Let a class method that copies a network's weights say so where they are packed."""
    copies = getattr(kind, name).__func__

    @functools.wraps(copies)
    def copied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, nn.Module)]
        if any(isinstance(module, IntegerLayer) for one in given for module in one.modules()):
            raise DgqError(
                f"{cls.__name__}.{name} copies float weights, and this network's are packed",
                f"give it the float one, or dequantize() it; {cls.__name__}.from_pretrained takes a DgqConfig too",
            )
        return copies(cls, *args, **kwargs)

    setattr(kind, name, classmethod(copied))


def _let_layers_be_skipped() -> None:
    """Tell `apply_layer_skip`, and the guiders that use it, of a fused block and of the attention what they know of
    diffusers' own. Past the tables' methods, which would import every transformer of diffusers."""
    block = layer_skip.TransformerBlockMetadata(return_hidden_states_index=0, _cls=FusedTransformerBlock)
    layer_skip.TransformerBlockRegistry._registry[FusedTransformerBlock] = block
    skipped = layer_skip._skip_proc_output_fn_Attention_AttnProcessor2_0
    attention = layer_skip.AttentionProcessorMetadata(skip_processor_output_fn=skipped)
    layer_skip.AttentionProcessorRegistry._registry[LogAttnProcessor] = attention


def register() -> None:
    """Teach diffusers the method "dgq", that `set_default_attn_processor` may replace its attention, that layers may be
    skipped, and what cannot be made of a quantized network."""
    _let_layers_be_skipped()
    for kind, name in _COPIES:
        _refuse_to_copy(kind, name)
    for place, kind in _COPIES_OF_TRANSFORMERS.items():
        if place in sys.modules:
            _refuse_to_copy(getattr(sys.modules[place], kind), "from_transformer")
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = DgqQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = DgqConfig
    unets: Any = unet_2d_condition
    unets.CROSS_ATTENTION_PROCESSORS = (*unets.CROSS_ATTENTION_PROCESSORS, LogAttnProcessor)
