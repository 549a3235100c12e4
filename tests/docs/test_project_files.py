"""The files around the code parse, and agree with each other and with the package."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CI, WEEKLY = (yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text()) for name in ("ci", "weekly"))
JOBS = {**CI["jobs"], **WEEKLY["jobs"]}
YAML = [
    *(ROOT / ".github").rglob("*.yml"),
    ROOT / ".pre-commit-config.yaml",
    ROOT / "CITATION.cff",
    ROOT / ".clang-format",
    ROOT / "mkdocs.yml",
]


@pytest.mark.parametrize("file", YAML, ids=lambda file: file.name)
def test_yaml_parses(file):
    assert yaml.safe_load(file.read_text())


def test_every_step_of_a_workflow_does_something():
    assert len(JOBS) == len(CI["jobs"]) + len(WEEKLY["jobs"])
    for name, job in JOBS.items():
        assert job["runs-on"], name
        assert all(("run" in step) != ("uses" in step) for step in job["steps"]), name


def test_targets_and_constraints_of_the_workflow_exist():
    makefile = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    run = "\n".join(step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step)
    for line in re.findall(r"^make ([^=\n]*?)(?: [A-Z]+=.*)?$", run, re.MULTILINE):
        assert all(f"\n{target}:" in makefile for target in line.split()), line
    for entry in CI["jobs"]["test"]["strategy"]["matrix"]["include"]:
        assert (ROOT / entry["constraints"]).exists()


def test_the_matrix_has_every_python_of_the_classifiers():
    named = set(re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"])))
    assert {entry["python"] for entry in CI["jobs"]["test"]["strategy"]["matrix"]["include"]} == named
    assert PROJECT["requires-python"] == ">=" + min(named, key=lambda version: int(version[2:]))


def test_the_oldest_constraints_are_the_lower_bounds():
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+?)(?:\.\*)?$", (ROOT / "constraints-oldest.txt").read_text(), re.M))
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", item).groups() for item in PROJECT["dependencies"])
    assert oldest.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert f"{oldest[name]}.0".startswith(f"{bound}."), name


def test_links_of_the_pages_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_every_page_is_in_the_index_and_in_the_site():
    index, site = (ROOT / "docs/README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name in site
        assert name == "README.md" or f"({name})" in index
