"""--lora and --tuned, as far as words go."""

import pytest
import typer

from dgq_cli.adapters import with_strength


@pytest.mark.parametrize(
    "text, name, strength",
    [
        ("x.safetensors", "x.safetensors", 1),
        ("x.safetensors:0.5", "x.safetensors", 0.5),
        ("a:b/x:-1", "a:b/x", -1),
        ("C:x.safetensors", "C:x.safetensors", 1),
        (":1", ":1", 1),
        ("x:.5", "x", 0.5),
        ("x:1e-3", "x", 0.001),
    ],
)
def test_file_and_strength(text, name, strength):
    found = with_strength(text)
    assert (str(found[0]), found[1]) == (name, strength)


@pytest.mark.parametrize("text", ["x:nan", "x:inf", "x:-1e999"])
def test_a_strength_that_is_not_finite(text):
    with pytest.raises(typer.BadParameter, match="the strength is not finite"):
        with_strength(text)
