"""The code of diffusers that dgq computes in its own way is the code that was read when this was written.

A fused module or an attention processor repeats what diffusers' own does, with quantized layers doing part of it. Where
diffusers changes its side, results part in silence: these hashes make it loud.
"""

import hashlib
import inspect
from collections.abc import Callable

import diffusers
import pytest
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.upsampling import Upsample2D

from dgq.integer import fused_unet

# What our code does instead of calling it, beside the methods that fused classes override.
REPEATED: dict[str, tuple[Callable[..., object], str]] = {
    "GEGLU.gelu": (GEGLU.gelu, "dgq_kernels: the gated epilogues"),
    "FeedForward.forward": (FeedForward.forward, "dgq/integer/fused_unet.py: FusedTransformerBlock.forward"),
    "Attention.forward": (Attention.forward, "dgq/integer/fused_unet.py: _attend"),
    "AttnProcessor2_0.__call__": (
        AttnProcessor2_0.__call__,
        "dgq/integer/attention.py: LogAttnProcessor, and dgq/paper/layers.py: PaperAttnProcessor",
    ),
    "Upsample2D.forward": (Upsample2D.forward, "dgq/families/autoencoder_kl.py: FoldedUpsample.forward"),
}

# First digits of the SHA-256 of each source, the same in every version that pyproject.toml allows: 0.42.0 and 0.42.1.
HASHES = {
    "GEGLU.forward": "28ea6dd13c76df98",
    "BasicTransformerBlock.forward": "440071576ac5ee6f",
    "Transformer2DModel._operate_on_continuous_inputs": "d21867fab58cac4d",
    "Transformer2DModel._get_output_for_continuous_inputs": "4787ea4f43c55009",
    "ResnetBlock2D.forward": "e3f38e1722955caf",
    "TimestepEmbedding.forward": "cca80413306b6a28",
    "GEGLU.gelu": "553eeddcc433f2e2",
    "FeedForward.forward": "dae2c9f53987c25a",
    "Attention.forward": "e6822ac3500626c7",
    "AttnProcessor2_0.__call__": "bf23ea5ae4040427",
    "Upsample2D.forward": "3c0e13df5e4ac796",
}


def overridden() -> dict[str, tuple[Callable[..., object], str]]:
    """Every method of diffusers that a fused class overrides: {"Class.method": (the method, what overrides it)}."""
    found = {}
    for name, fused in vars(fused_unet).items():
        if not (inspect.isclass(fused) and fused.__module__ == fused_unet.__name__):
            continue
        for method in vars(fused):
            base = next((parent for parent in fused.__mro__[1:] if method in vars(parent)), None)
            if base is not None and base.__module__.startswith("diffusers.") and inspect.isfunction(vars(base)[method]):
                found[f"{base.__name__}.{method}"] = (vars(base)[method], f"{fused_unet.__file__}: {name}.{method}")
    return found


SOURCES = {**overridden(), **REPEATED}


def test_no_hash_is_left_over():
    assert not HASHES.keys() - SOURCES.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_source_is_the_one_that_was_read(name):
    source, ours = SOURCES[name]
    digest = hashlib.sha256(inspect.getsource(source).encode()).hexdigest()[:16]
    assert digest == HASHES.get(name), (
        f"{name} of diffusers {diffusers.__version__} is not the code that dgq was written beside. Compare "
        f"{inspect.getsourcefile(source)} with {ours}: where ours computes the same, put {digest} into HASHES; "
        "else mend ours first"
    )
