"""The terminal's heat map."""

import io

from rich.console import Console

from dgq_cli import heat_map


def printed(width: int, **options: object) -> str:
    out = io.StringIO()
    shown = heat_map.columns(5, width - 10)
    console = Console(file=out, width=width, highlight=False, **options)  # type: ignore[arg-type]
    console.print(heat_map.head(10, shown))
    console.print(heat_map.row("a long name", [5.0, 12.4, 39.6, 99.0, -30.0], 10, shown))
    return out.getvalue()


def test_columns_hold_every_step_and_fit() -> None:
    for steps in (1, 4, 25, 50, 1000):
        for width in (3, 30, 60, 100):
            shown = heat_map.columns(steps, width)
            assert [step for column in shown for step in column] == list(range(steps))
            assert len(shown) * heat_map.CELL <= width
    assert len(heat_map.columns(20, 60)) == 20


def test_numbers_are_readable_without_colours() -> None:
    assert printed(40).splitlines() == ["step       1  2  3  4  5 ", "a long nam 5 12 40 99 -9 "]


def test_a_narrow_map_shows_the_lowest_of_several_steps() -> None:
    assert printed(20).splitlines()[1] == "a long nam 5 40 -9 "


def test_colours_go_from_red_to_blue(monkeypatch: object) -> None:
    text = printed(40, force_terminal=True, color_system="truecolor", no_color=False)
    assert "48;2;165;0;38" in text  # the worst
    assert "48;2;69;117;180" in text  # the best
    assert "\x1b" not in printed(40, force_terminal=True, color_system="truecolor", no_color=True)
