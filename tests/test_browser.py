"""What a page fetches and complains of is seen: tests that want neither could not fail otherwise."""

import browser
import pytest


@pytest.mark.skipif(browser.chromium() is None, reason="there is no Chromium")
def test_requests_and_complaints_are_told(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<meta name=viewport content='width=device-width'><img src='http://127.0.0.1:9/x.png'>"
        "<script>console.log(1); nosuch()</script>"
    )
    with browser.tab() as tab:
        tab.open(page.as_uri(), width=390, dark=True)
        assert tab.requests == [page.as_uri(), "http://127.0.0.1:9/x.png"]
        assert any("nosuch" in one for one in tab.complaints)
        assert any('"console' in one or '"log"' in one for one in tab.complaints)
        assert tab.run("[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [390, True]
        with pytest.raises(AssertionError, match="nosuch"):
            tab.run("nosuch")
