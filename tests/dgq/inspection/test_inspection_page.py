"""The page of a measured checkpoint holds what was measured, fetches nothing, and works in a browser."""

import dataclasses
import json
import re

import browser
import pytest

from dgq.errors import DgqError
from dgq.inspection import page
from dgq.inspection.inspect import inspect
from dgq.inspection.measure import MeasureOptions, measure_checkpoint


@pytest.fixture(scope="module")
def found(tiny_checkpoint):
    return inspect(tiny_checkpoint, measurement=measure_checkpoint(tiny_checkpoint, MeasureOptions(1, 3)))


@pytest.fixture
def file(found, tmp_path):
    page.write(found, tmp_path / "page.html", [("base model", "a </script><b>model</b>")])
    return tmp_path / "page.html"


def data_of(file):
    held = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text("utf-8"), re.DOTALL)
    return json.loads(held[1])


def test_holds_what_was_measured(found, file):
    data = data_of(file)
    measured = found.measurement
    assert [one["name"] for one in data["layers"]] == [one.name for one in measured.layers]
    for told, one in zip(data["layers"], measured.layers, strict=True):
        assert told["sqnr"] == pytest.approx(one.sqnr_db_by_step, abs=0.01)
        assert (told["noise"], told["share"]) == (one.noise_by_step, one.noise)
    assert [row[0] for row in data["attention"]] == [one.name for one in measured.attention]
    assert data["advice"]["command"].endswith(found.suggestion.command_line)
    assert data["summary"] == [["base model", "a </script><b>model</b>"]]


def test_what_was_not_measured_is_refused(found, tmp_path):
    with pytest.raises(DgqError, match="was not measured"):
        page.write(dataclasses.replace(found, measurement=None), tmp_path / "page.html", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(browser.chromium() is None, reason="there is no Chromium")
def test_in_a_browser(found, file):
    """A row a layer, the keys choose one, other orders and rows; nothing is fetched, nothing logged; fits a phone."""
    layers = found.measurement.layers
    with browser.tab() as tab:
        tab.open(file.as_uri(), width=390, dark=True)

        def names():
            return tab.run("[...document.querySelectorAll('#map tbody th')].map(one => one.title)")

        def chosen():
            return tab.run("document.querySelector('#one b').textContent")

        assert names() == [*(one.name for one in layers), "UNet output"]
        assert tab.run("document.querySelector('#map tbody td').textContent") == str(
            int(layers[0].sqnr_db_by_step[0] + 0.5)
        )
        tab.run("document.querySelector('#map tbody').focus()")
        for key in ("ArrowDown", "ArrowDown", "ArrowUp"):
            tab.press(key)
        assert chosen() == layers[1].name
        tab.press("End")
        assert chosen() == layers[-1].name
        assert tab.run("document.querySelectorAll('#map tr[aria-selected=true]').length") == 1
        tab.choose("order", "noise")
        worst = sorted(layers, key=lambda one: -one.noise)
        assert names()[:-1] == [one.name for one in worst]
        share = worst[0].noise / found.measurement.noise
        assert f"of the noise {100 * share:.1f} %" in tab.run("document.querySelector('#one').textContent")
        tab.choose("rows", "blocks")
        assert len(names()) == len({one["block"] for one in data_of(file)["layers"]}) + 1
        tab.choose("cells", "noise")
        assert "UNet output" not in names()
        assert tab.run("document.documentElement.scrollWidth") <= 390
        assert tab.run("getComputedStyle(document.body).colorScheme") == "light dark"
        assert (tab.requests, tab.complaints) == ([file.as_uri()], [])
