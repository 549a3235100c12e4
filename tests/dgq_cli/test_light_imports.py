"""What a process that only draws leaves for later, and that it comes when something asks for it."""

import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import textwrap

import pytest
import torch

from dgq_cli.light_imports import absent, defer, light_imports, unread_distributions

# The compiler, LoRA's library, distributed tensors and sympy: each takes a quarter of a second to one second. And
# networks and pipelines that are not this model's.
LEFT = (
    "torch._dynamo.convert_frame",
    "torch._inductor",
    "peft",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "sympy",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.models.controlnets.controlnet_flux",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.unets.unet_kandinsky3",
    "diffusers.pipelines.flux",
    "transformers.models.t5",
)
# Packages whose own code waits.
WAITING = (
    "diffusers.models.autoencoders",
    "diffusers.models.controlnets",
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "torch._dynamo",
    "torch.nn.attention.flex_attention",
    "transformers",
    "transformers.models",
)


def fresh(code, *arguments):
    """What code in a process of its own writes as JSON in its last line."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_generate_imports_little_and_draws_the_same(dgq_command, tiny_checkpoint, tmp_path):
    arguments = ["generate", "a cat", "--model", str(tiny_checkpoint), "--seed", "3", "--steps", "2"]
    code = """
    import json, sys
    from dgq_cli.main import main
    try:
        main()
    except SystemExit as end:
        assert end.code == 0
    waiting = [name for name, module in sys.modules.items() if getattr(module, "ran", None) is False]
    print(json.dumps([sorted(sys.modules), waiting]))
    """
    modules, waiting = fresh(code, *arguments, "--out", tmp_path / "light.png")
    assert "diffusers.models.unets.unet_2d_condition" in modules
    assert not set(LEFT) & set(modules)
    assert set(waiting) == set(WAITING)
    run = dgq_command(*arguments, "--out", tmp_path / "full.png")  # in a process that imported everything before
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "light.png").read_bytes() == (tmp_path / "full.png").read_bytes()


@pytest.mark.parametrize("command", ["bench", "calibrate", "export", "inspect", "serve"])
def test_other_commands_import_little(command, tiny_pipeline, tiny_checkpoint, tmp_path):
    code = """
    import json, sys
    from dgq_cli.main import main
    try:
        main()
    except SystemExit as end:
        print(json.dumps([end.code, sorted(sys.modules)]))
    """
    arguments, expected = {
        "bench": (["--predict", "none"], 1),
        "calibrate": ([tiny_pipeline, "--dry-run"], 0),
        "export": ([tiny_checkpoint, "--to", "comfy", "--out", tmp_path / "comfy.safetensors"], 0),
        "inspect": ([tiny_checkpoint], 0),
        "serve": (["--model", tmp_path / "none"], 1),
    }[command]
    code, modules = fresh(code, command, *arguments)
    assert code == expected
    assert "dgq.pictures.pipelines" in modules
    assert set(LEFT) & set(modules) <= {"sympy"}  # which shapes without values ask for


def test_compiler_comes_when_something_compiles():
    """With all marks that were made before; and diffusers knows a compiled module, and has flex attention."""
    code = """
    import json, sys
    from dgq_cli.light_imports import light_imports
    with light_imports():
        import dgq
    import torch
    from diffusers.models.attention_dispatch import flex_attention
    from diffusers.utils.torch_utils import is_compiled_module

    @torch.compiler.disable
    def apart(x):
        return x.sin()

    @torch.compiler.disable(recursive=False)
    def apart_too(x):
        return x.cos()

    @torch.compiler.allow_in_graph
    def whole(x):
        return x.exp()

    @torch.compiler.assume_constant_result
    def constant():
        return 3

    class Net(torch.nn.Module):
        def forward(self, x):
            return whole(apart_too(apart(x + 1)) * constant())

    net, x = Net(), torch.ones(2)
    plain, known = net(x), is_compiled_module(net)
    before = "torch._dynamo.convert_frame" in sys.modules
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.name for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(net, backend=backend)
    same = torch.equal(compiled(x), plain)
    waited = not flex_attention.ran
    flex = flex_attention.BlockMask.__module__
    print(json.dumps([known, before, is_compiled_module(compiled), same, graphs, waited, flex]))
    """
    known, before, compiled, same, graphs, waited, flex = fresh(code)
    assert (known, before) == (False, False)
    assert (waited, flex) == (True, "torch.nn.attention.flex_attention")
    assert (compiled, same) == (True, True)
    assert len(graphs) == 2  # the disabled functions lie between
    assert "whole" in graphs[-1][-1]  # allowed in the graph: not traced


def test_transformers_classes_are_found_without_its_list():
    """And are the same that the list knows; what is not found by its name comes with the list."""
    code = """
    import json, sys
    from dgq_cli.light_imports import light_imports
    with light_imports():
        import dgq
    import transformers
    names = ("CLIPTextModelWithProjection", "CLIPTokenizer", "T5EncoderModel", "T5TokenizerFast", "AutoTokenizer",
             "Qwen2_5_VLForConditionalGeneration", "Gemma2PreTrainedModel", "PreTrainedTokenizerFast",
             "PreTrainedModel", "masking_utils", "__version__")
    early = {name: getattr(transformers, name) for name in names}
    none = hasattr(transformers, "ModelMixin")
    waited = not sys.modules["transformers"].ran
    late = transformers.set_seed
    listed = sys.modules["transformers"]
    same = [name for name in names if early[name] is getattr(listed, name) or early[name] == listed.__version__]
    print(json.dumps([waited, none, late.__module__, listed is not transformers, transformers.set_seed is late,
                      hasattr(listed, "ModelMixin"), sorted(set(names) - set(same))]))
    """
    assert fresh(code) == [True, False, "transformers.trainer_utils", True, True, False, []]


def test_base_class_that_is_elsewhere_comes_with_the_list():
    code = """
    import json, sys
    from dgq_cli import light_imports
    light_imports.BASES["ImageProcessingMixin"] = "no_such_module"
    with light_imports.light_imports():
        import dgq
    waited = not sys.modules["transformers"].ran
    from transformers import ImageProcessingMixin
    print(json.dumps([waited, ImageProcessingMixin.__module__]))
    """
    assert fresh(code) == [True, "transformers.image_processing_base"]


def test_submodules_that_only_a_packages_code_knows():
    """Names that transformers had for its modules before."""
    code = """
    import json, sys
    from dgq_cli.light_imports import light_imports
    with light_imports():
        import dgq
    waited = not sys.modules["transformers"].ran
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast as old
    from transformers import PreTrainedTokenizerFast as new
    try:
        import transformers.no_such_module
    except ModuleNotFoundError as error:
        print(json.dumps([waited, old is new, error.name]))
    """
    assert fresh(code) == [True, True, "transformers.no_such_module"]


def test_distributions_are_read_when_one_is_looked_up():
    asked = importlib.metadata.packages_distributions
    known = asked()
    with unread_distributions():
        first = importlib.metadata.packages_distributions()
        assert "torch" in first
        assert "no_such_package" not in first
        assert dict(first) == dict(known)
        assert importlib.metadata.packages_distributions() is first
    assert importlib.metadata.packages_distributions is asked


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that counts how often its code runs."""
    folder = tmp_path / "slow_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("import part_log\npart_log.ran += 1\nvalue = 7\nfrom . import part\n")
    (folder / "part.py").write_text("other = 8\n")
    (tmp_path / "part_log.py").write_text("ran = 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("part_log")
    for name in ("slow_package", "slow_package.part", "part_log"):
        sys.modules.pop(name, None)


def test_package_runs_at_first_use_and_once(package):
    waiting = defer("slow_package")
    waiting.stand_in(part="stand-in")
    assert importlib.import_module("slow_package") is waiting
    assert waiting.part == "stand-in"
    assert not hasattr(waiting, "__wrapped__")
    del waiting.stand_ins["part"], waiting.part
    from slow_package.part import other

    assert (other, package.ran) == (8, 0)
    from slow_package import value

    assert (value, waiting.value, waiting.part.other, package.ran) == (7, 7, 8, 1)
    with pytest.raises(AttributeError, match="nothing"):
        _ = waiting.nothing
    assert package.ran == 1
    assert defer("slow_package") is None  # imported
    assert defer("no_such_package") is None


def test_code_takes_the_place_of_stand_ins(package):
    waiting = defer("slow_package")
    waiting.stand_in(part="stand-in")
    assert waiting.value == 7
    assert waiting.part.other == 8


def test_code_runs_before_submodules_that_cannot_do_without(package):
    waiting = defer("slow_package", apart=())
    part = importlib.import_module("slow_package.part")
    assert (package.ran, waiting.ran) == (1, True)
    assert part is waiting.part  # which the code imported
    assert part.__spec__.loader.name == "slow_package.part"


def test_package_that_puts_another_in_its_place(package, tmp_path):
    code = "import sys, types\nsys.modules[__name__] = types.SimpleNamespace(value=9)\n"
    (tmp_path / "slow_package" / "__init__.py").write_text(code)
    waiting = defer("slow_package")
    assert waiting.value == 9
    assert waiting.value == 9


def test_absent_while_it_lasts(package):
    with absent("slow_package"):
        assert importlib.util.find_spec("slow_package") is None
        with pytest.raises(ImportError):
            importlib.import_module("slow_package")
    assert importlib.import_module("slow_package").value == 7
    with absent("slow_package"):
        assert importlib.import_module("slow_package").value == 7


def test_nothing_changes_where_diffusers_is_imported():
    before = torch.distributed.is_available, sys.modules.get("torch._dynamo"), sys.modules.get("peft")
    assert importlib.import_module("diffusers")
    with light_imports():
        assert torch.distributed.is_available is before[0]
    assert (torch.distributed.is_available, sys.modules.get("torch._dynamo"), sys.modules.get("peft")) == before
