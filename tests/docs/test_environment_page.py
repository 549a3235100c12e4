"""docs/environment.md names every environment variable that the sources read, and none that they do not know."""

import ast
import re
from pathlib import Path

from dgq.doctor import VARIABLES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
SOURCES = [
    file
    for folder in ("dgq", "dgq_cli", "kernels")
    for file in (ROOT / folder).rglob("*")
    if file.suffix in (".py", ".cpp", ".h", ".inc")
]


def literal(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def reads(tree: ast.AST) -> set[str]:
    """Names in os.environ["NAME"], os.environ.get("NAME"), os.getenv("NAME") and "NAME" in os.environ."""
    found: set[str | None] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            found.add(literal(node.slice))
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            if called == "os.getenv" or called.startswith("os.environ."):
                found.add(literal(node.args[0]))
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            found.add(literal(node.left))
    return {name for name in found if name}


def known() -> set[str]:
    """Every variable the sources know: read by Python or by the engine, or shown by `dgq doctor`."""
    found = set(VARIABLES)
    for file in SOURCES:
        text = file.read_text(encoding="utf-8")
        found |= set(re.findall(r"\bgetenv\(\"(\w+)\"\)", text))
        if file.suffix == ".py":
            found |= reads(ast.parse(text))
    return found


def test_every_variable_is_on_the_page():
    named = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", PAGE))
    assert not known() - named, "docs/environment.md does not tell what these do"


def test_no_variable_of_ours_is_on_the_page_alone():
    ours = {name for name in known() if name.startswith("DGQ_")}
    assert set(re.findall(r"\bDGQ_\w+", PAGE)) == ours


def test_doctor_prints_every_variable_of_the_page():
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(VARIABLES)


def test_each_way_of_reading_is_seen():
    code = 'os.environ["A"]; os.environ.get("B", ""); os.getenv("C"); "D" in os.environ; os.environ[other]'
    assert reads(ast.parse(code)) == {"A", "B", "C", "D"}
