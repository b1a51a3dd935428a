"""What every page is made of: colours that can be read, axes with round ticks, text that stays text."""

from __future__ import annotations

import math
import re

import pytest

from runtime.page.charts import Axis, Bar, BarGroup, Bars, bins
from runtime.page.frame import FORBIDDEN, HERE, shortened

STYLE = (HERE / "style.css").read_text()
LIGHT, DARK = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in STYLE.split("@media screen")[:2])
PAIRS = [("text", "page"), ("text", "surface"), ("muted", "page"), ("muted", "surface"), ("link", "page")]
PAIRS += [("good", "page"), ("good", "good-page"), ("bad", "page"), ("bad", "bad-page"), ("warn", "page")]
PAIRS += [("text", "mark"), ("text", "good-page"), ("text", "bad-page"), ("muted", "good-page"), ("muted", "bad-page")]
PAIRS += [("link", "bad-page")]


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    """By WCAG 2: 4.5 is asked of text, 3 of graphics."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_everything_can_be_read(scheme):
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    too_low = {pair: contrast(scheme[pair[0]], scheme[pair[1]]) for pair in PAIRS}
    assert not {pair: value for pair, value in too_low.items() if value < 4.5}
    colours = [value for name, value in scheme.items() if re.fullmatch(r"c\d", name)]
    assert len(colours) == 8 and min(contrast(colour, scheme["page"]) for colour in colours) >= 3
    assert LIGHT.keys() == DARK.keys()


def test_every_class_of_the_templates_is_one_that_is_styled():
    styled = set(re.findall(r"\.([a-z][\w-]*)", re.sub(r"\d\.\d", "", STYLE)))
    root = HERE.parents[1]
    templates = [*HERE.glob("*.html"), root / "runtime/parity/report.html", root / "bench/report.html"]
    used = {
        name
        for file in templates
        for found in re.findall(r'class="([^"{]+)', file.read_text())
        for name in found.split()
    }
    assert len(used) > 20 and used - styled - {"c"} == set()


@pytest.mark.parametrize(
    ("values", "low", "expected"),
    [
        ([64.2, 69.8], 0, ["0", "20", "40", "60", "80"]),
        ([100.0], 0, ["0", "20", "40", "60", "80", "100"]),
        ([0.0003], 0, ["0", "0.0001", "0.0002", "0.0003"]),
        ([15.2, 17.9], 15.1, ["15", "16", "17", "18"]),
        ([1_200_000], 0, ["0", "250,000", "500,000", "750,000", "1,000,000", "1,250,000"]),
        ([], 0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([0.0], 0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([3.0, math.inf, math.nan], 0, ["0", "1", "2", "3"]),
    ],
)
def test_a_linear_axis_has_round_ticks_around_all_values(values, low, expected):
    axis = Axis.linear("ms", values, low)
    assert [text for _, text in axis.ticks] == expected
    assert axis.at(axis.low) == 0 and axis.at(axis.high) == 100
    assert all(axis.low <= value <= axis.high for value in values if math.isfinite(value))
    assert axis.at(math.inf) == 100 and axis.at(math.nan) == axis.at(-1e9) == 0


def test_a_logarithmic_axis_ends_at_powers():
    axis = Axis.powers("tokens", 2, [38, 544])
    assert (axis.low, axis.high) == (32, 1024) and [text for _, text in axis.ticks][-1] == "1,024"
    assert axis.at(32 * 2**2.5) == 50 and axis.at(5) == 0 and axis.at(0) == 0
    assert Axis.powers("tokens", 2, [64]).at(64) == 0
    assert [text for _, text in Axis.powers("logits", 10, [1e-5, 10]).ticks][:2] == ["10⁻⁵", "10⁻⁴"]
    assert len(Axis.powers("tokens", 2, [1, 2**40]).ticks) <= 8


def test_bars_reach_for_the_largest_of_values_spreads_and_limits():
    def most(*bars, limit=None):
        return Bars("engine", "tokens/s", (), (BarGroup("", bars, limit),)).axis.high

    assert most(Bar("a", 3.0, ())) == 3
    assert most(Bar("a", 3.0, (), (2.0, 3.7))) == 4
    assert most(Bar("a", 3.0, ()), limit=9.5) == 10


def test_bins_count_every_value_once():
    assert bins([0, 0.5, 1, 1.9, 2, 3, -1], 0, 2, 2) == [3, 4]


def test_a_long_text_keeps_its_beginning_and_its_end():
    assert shortened("short") == "short" and shortened("two\nlines\t") == "two↵lines⇥"
    long = shortened("The beginning " + "and so on " * 100 + "until the end", 40)
    assert len(long) <= 40 and long.startswith("The beginning") and " … " in long and long.endswith("the end")


def test_only_characters_that_html_forbids_are_replaced():
    assert FORBIDDEN.sub("?", "a\x00\x1b\x7f\x85\ud800\ufffe") == "a??????"
    assert not FORBIDDEN.search("\t\n\r é 雪 🙂 \u202e \ufffd")
