"""The page of pictures holds what was measured, fetches nothing, and works in a browser where there is one."""

import json
import re

import browser
import pytest
from PIL import Image

from dgq.errors import DgqError
from dgq.evaluation import page
from dgq.evaluation.evaluate import Kept
from dgq.pictures.generation import Picture

PROMPTS = ("a red </script><b>cat</b> <!-- ", "a dog", "Ünïcode \u2028 'quotes' \"and\" \\ more")


def picture(prompt, value, size=(24, 16)):
    return Picture(Image.new("RGB", size, (value, 90, 160)), prompt, 7, "", None)


def kept(size=(24, 16), **changes):
    """Two checkpoints, three pictures each; the second's first picture is worst, the first's last."""
    found = Kept()
    for name, psnr in (("one", [30.0, 25.0, 20.0]), ("two", [10.0, 40.0, 35.0])):
        items = [
            {"prompt": prompt, "seed": 7 + i, "psnr_db": psnr[i], "ssim": 0.5, "top1": 1.0}
            for i, prompt in enumerate(PROMPTS)
        ]
        report = {
            "model": f"models/{name}",
            "recipe": "integer W4A8",
            "against": "dgq-emoji",
            "prompts": 3,
            "seeds": 1,
            "settings": {"steps": 4, "guidance": 3.0, "seed": 7},
            "items": items,
            "dgq": "1",
            "torch": "2",
            "sha256": "abcdef0123456789",
            "bytes": 2**21,
            "fidelity": {"ssim": {"mean": 0.5}},
        }
        report |= changes if name == "two" else {}
        floats = [picture(prompt, 200, size) for prompt in PROMPTS]
        found.systems.append((report, floats, [picture(prompt, 60, size) for prompt in PROMPTS]))
    return found


@pytest.fixture
def file(tmp_path):
    bench = tmp_path / "bench.json"
    row = {"system": "dgq W4A8", "case": "step", "p50_ms": 12.345678, "gops": None, "ratio_to_float32": 0.5}
    bench.write_text(json.dumps({"rows": [row]}))
    page.write_page(tmp_path / "page.html", kept(), page.read_bench(bench))
    return tmp_path / "page.html"


def data_of(file):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text("utf-8"), re.DOTALL)
    return json.loads(found[1])


def test_holds_what_was_measured(file):
    data = data_of(file)
    assert [item["prompt"] for item in data["systems"][0]["items"]] == list(PROMPTS)
    assert [system["name"] for system in data["systems"]] == ["one, integer W4A8", "two, integer W4A8"]
    assert data["head"] == ["checkpoint", "PSNR, median (dB)", "worst tenth", "SSIM", "MiB", "SHA-256"]
    assert data["rows"][1] == ["two, integer W4A8", "35.0", "10.0", "0.5000", "2.0", "abcdef012345"]
    assert data["bench"] == {
        "head": ["this machine", "", "ms", "of float32's time"],
        "rows": [["dgq W4A8", "step", "12.3", "0.5"]],
    }
    assert all(address.startswith("data:image/png;base64,") for address in data["floats"])


def test_tells_of_lpips_where_it_was_measured(tmp_path):
    found = kept()
    for report, _, _ in found.systems:
        for item, value in zip(report["items"], (0.1, 0.3, 0.2), strict=True):
            item["lpips"] = value
    page.write_page(tmp_path / "page.html", found)
    data = data_of(tmp_path / "page.html")
    assert dict(zip(data["head"], data["rows"][0], strict=True))["LPIPS, median"] == "0.2000"
    assert dict(zip(data["head"], data["rows"][0], strict=True))["LPIPS, worst tenth"] == "0.3000"


def test_large_pictures_are_compressed_and_said_to_be(tmp_path):
    page.write_page(tmp_path / "page.html", kept((300, 200)))
    data = data_of(tmp_path / "page.html")
    assert all(address.startswith("data:image/webp;base64,") for address in data["floats"])
    assert "WebP" in data["about"]


@pytest.mark.parametrize("changes", [{"against": "another"}, {"settings": {"steps": 5, "guidance": 3.0, "seed": 7}}])
def test_pictures_that_cannot_be_compared_are_refused(tmp_path, changes):
    with pytest.raises(DgqError, match="differ in their"):
        page.write_page(tmp_path / "page.html", kept(**changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{}", '{"rows": []}', '{"rows": [{"system": "x"}]}', '{"rows": [3]}'])
def test_a_file_that_is_no_benchmark_is_refused(tmp_path, text):
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(DgqError, match=r"bench\.json: holds no rows"):
        page.read_bench(tmp_path / "bench.json")


@pytest.mark.skipif(browser.chromium() is None, reason="there is no Chromium")
def test_in_a_browser(file):
    """Sorted worst first, the slider moves by key, views and checkpoints change; nothing is fetched, nothing logged."""
    with browser.tab() as tab:
        tab.open(file.as_uri(), width=390, dark=True)

        def prompts():
            return tab.run("[...document.querySelectorAll('figcaption b')].map(one => one.textContent)")

        assert prompts() == [PROMPTS[2], PROMPTS[1], PROMPTS[0]]
        tab.run("document.querySelector('figure input').focus()")
        for _ in range(5):
            tab.press("ArrowRight")
        assert tab.run("document.querySelector('.pair').style.getPropertyValue('--at')") == "55%"
        assert tab.run("getComputedStyle(document.querySelector('.over')).clipPath") == "inset(0px 0px 0px 55%)"
        tab.choose("system", "1")
        assert prompts() == [PROMPTS[0], PROMPTS[2], PROMPTS[1]]
        tab.choose("order", "")
        assert prompts() == list(PROMPTS)
        tab.choose("view", "difference")
        assert tab.run("document.querySelectorAll('.pair.difference').length") == 3
        assert tab.run("getComputedStyle(document.querySelector('figure input')).display") == "none"
        assert tab.run("[...document.images].every(one => one.complete && one.naturalWidth)")
        assert tab.run("document.documentElement.scrollWidth") <= 390
        assert (tab.requests, tab.complaints) == ([file.as_uri()], [])
