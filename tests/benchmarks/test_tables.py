"""The tables of the docs are those of the files they come from."""

import re
from pathlib import Path

import pytest

from benchmarks import tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.relative_to(tables.ROOT).as_posix())
def test_a_page_is_what_make_tables_writes(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.written(text) == text, "run `make tables`"


def test_every_table_stands_once_and_every_marker_is_closed() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    assert sorted(re.findall(r"<!-- table: (.*?) -->", text)) == sorted(tables.TABLES)
    assert text.count("<!-- /table -->") == len(tables.TABLES)


def test_a_figure_of_the_files_reaches_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    report = {
        "rows": [
            {
                "system": "integer W8A8",
                "psnr_db": 12.345,
                "psnr_median_db": 13.0,
                "latent_mse": 0.5,
                "latent_sqnr_db": 3,
                "unet_mib": 7,
                "of_float16": 0.25,
            }
        ]
    }
    monkeypatch.setattr(tables, "report", {"fidelity-embedded": report}.__getitem__)
    new = tables.written("before\n<!-- table: fidelity -->\n| old |\n<!-- /table -->\nafter\n")
    assert "| integer W8A8 | 12.35 | 13.00 | - | 5.00e-01 | 3.00 | 7.0 | 25% |\n<!-- /table -->\nafter" in new
    assert "old" not in new


def test_a_run_that_is_not_in_the_file_is_named() -> None:
    with pytest.raises(SystemExit, match="0 rows of 1999, float32, step"):
        tables.measured("1999", "float32")
