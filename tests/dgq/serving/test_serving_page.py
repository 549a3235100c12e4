"""The page: what it asks for, and itself in a browser where there is one."""

import base64
import io
import json
import shutil

import httpx
import pytest
from PIL import Image

LONG = 1000  # steps of a picture that nobody waits for


@pytest.fixture(scope="module")
def beside(start):
    return start(beside=True)


def lines(served, **wanted):
    with httpx.stream("POST", served.url + "/draw", json={"prompt": "a cat", **wanted}, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("application/x-ndjson")
        return [json.loads(line) for line in answer.iter_lines()]


def test_steps_and_pictures_line_by_line(beside):
    first, *steps, one, two = lines(beside, prompt="a zebra", seed=7, steps=2, count=2, beside=True)
    assert first == {"ahead": 0, "strange": ["zebra"]}
    # the last ones may come after the pictures, and are left out then
    assert steps == [{"step": i % 4 + 1, "steps": 4, "number": i // 4} for i in range(8)][: len(steps)]
    assert len(steps) >= 4
    assert (one["picture"]["seed"], two["picture"]["seed"]) == ("7", "8")
    assert one["picture"]["name"] == "a-zebra-7.png"
    texts = [Image.open(io.BytesIO(base64.b64decode(one["picture"][part]))).text for part in ("png", "beside")]
    assert texts[0]["parameters"] == one["picture"]["parameters"]
    assert texts[1]["parameters"].endswith("Quantization: float")


def test_a_failure_is_the_last_line(served, damaged_vae):
    assert "not finite" in lines(served, steps=1)[-1]["error"]


def test_the_page_knows_the_model_and_fetches_nothing(served):
    answer = httpx.get(served.url)
    assert f'"model": "{served.drawer.id}"' in answer.text
    assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert "http://" not in answer.text
    assert "https://" not in answer.text


def test_in_a_browser(beside):
    """Drawing by Enter, progress, seeds, the float picture beside, errors, stopping; nothing more is fetched."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        seen, asked = [], []
        tab.on("console", lambda message: seen.append(message.text))
        tab.on("pageerror", lambda error: seen.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(beside.url)
        status = tab.locator("#status")

        def until(text):
            playwright.expect(status).to_contain_text(text, timeout=30000)

        # what it was given
        assert tab.input_value("#width") == "16"
        assert tab.input_value("#steps") == str(beside.drawer.settings.steps)
        # two pictures, each beside the float model's, the newest first
        tab.fill("#steps", "3")
        tab.fill("#count", "2")
        tab.fill("#seed", "9007199254740993")  # more than a number of JavaScript can say
        tab.check("#beside")
        tab.fill("#prompt", "a <b>zebra</b>")
        tab.press("#prompt", "Enter")
        until("done · this model never saw: b, zebra, b")
        assert tab.locator("figure").count() == 2
        assert tab.locator("figure b").all_text_contents() == ["a <b>zebra</b>"] * 2
        seeds = [text.split(" · ")[0] for text in tab.locator("figcaption div").all_text_contents()]
        assert seeds == ["seed 9007199254740994", "seed 9007199254740993"]
        assert tab.locator("figure img").evaluate_all("all => all.map(one => one.naturalWidth)") == [16] * 4
        assert tab.locator("figure span").all_text_contents() == [beside.drawer.model.label, "float"] * 2
        # another one, alone
        tab.uncheck("#beside")
        tab.fill("#count", "1")
        tab.fill("#seed", "")
        tab.click("#go")
        until("done")
        assert tab.locator("figure").count() == 3
        # a seed is taken again; the file has a name
        first = tab.locator("figure").first
        seed = first.locator("a").first.text_content().removeprefix("seed ")
        first.locator("a").first.click()
        assert tab.input_value("#seed") == seed
        with tab.expect_download() as download:
            first.locator("a", has_text="save").click()
        assert download.value.suggested_filename == f"a-b-zebra-b-{seed}.png"
        # what cannot be drawn
        tab.fill("#prompt", "cat " * 40)
        tab.click("#go")
        until("shorten the prompt")
        assert "wrong" in status.get_attribute("class")
        # progress, and stopping, which frees the place
        tab.fill("#prompt", "a cat")
        tab.fill("#steps", str(LONG))
        tab.click("#go")
        until("step ")
        assert 0 < tab.locator("#bar").evaluate("bar => bar.value") < 1
        assert tab.locator("#go").is_disabled()
        tab.click("#stop")
        until("stopped")
        beside.wait_for(lambda drawer: not drawer._jobs)
        assert tab.locator("figure").count() == 3
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        others = [url for url in asked if url not in (f"{beside.url}/", f"{beside.url}/draw")]
        assert not [url for url in others if not url.startswith("data:")]
        # the browser itself logs the answer with status 400
        assert [text for text in seen if "400 (Bad Request)" not in text] == []
        browser.close()
