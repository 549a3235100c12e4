"""An operator is a folder that is imported: whoever lists operators then finds it, with its samples and kernels."""

import importlib
import sys

import pytest
import torch

from dgq.self_test import self_test
from dgq_kernels import aot, backend
from dgq_kernels.samples import samples

FILES = {
    "__init__.py": """
import torch
from torch import Tensor

from dgq_kernels.backend import implementation, operator
from dgq_kernels.fakes import register_fake

from . import reference


@operator("toy::double")
def double(x: Tensor) -> Tensor:
    return implementation(reference.double, x)(x)


@register_fake(double)
def _(x):
    return torch.empty_like(x)
""",
    "reference.py": "def double(x):\n    return x + x\n",
    "cpu.py": "factor = 2\n\n\ndef double(x):\n    return factor * x\n",
    "samples.py": """
import torch

from dgq_kernels.samples import Sample


def samples():
    yield Sample("double", (torch.arange(5.0),))
""",
    "aot.py": "def cases(major):\n    yield 'a case of the toy'\n",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    folder = tmp_path / "toy_double"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("toy_double")
    for name in [name for name in sys.modules if name.startswith("toy_double")]:
        del sys.modules[name]
    del backend.OPERATORS["double"], backend.FOLDERS["double"]


def test_whoever_lists_operators_finds_it(toy, monkeypatch):
    (sample,) = [one for one in samples() if one.operator == "double"]
    torch.library.opcheck(toy.double, sample.arguments)
    assert "a case of the toy" in list(aot.cases("90"))

    def checked():
        return {check.name: check.ok for check in self_test(torch.device("cpu"))}

    assert checked()["double"]
    monkeypatch.setattr(sys.modules["toy_double.cpu"], "factor", 3)
    assert [name for name, ok in checked().items() if not ok] == ["double"]
    monkeypatch.setenv("DGQ_BACKEND", "reference")
    assert checked()["double"]  # another backend's
