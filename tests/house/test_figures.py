"""The README compares with others only as far as the measured ranges carry."""

from __future__ import annotations

import re

import build_figures
import pytest
from build_figures import Comparison, Spread, spread, verdict

from tests.house import tree


def test_overlapping_ranges_carry_no_factor():
    assert verdict(Spread(90, 180, 184), Spread(63, 85, 108), higher=True) == "ranges overlap"
    assert verdict(Spread(57, 64, 72), Spread(68, 82, 97), higher=False) == "ranges overlap"
    assert verdict(Spread(5, 6, 9), Spread(1, 2, 99), higher=True) == "ranges overlap"


def test_parted_ranges_carry_the_ratio_of_the_medians_either_way():
    assert verdict(Spread(90, 180, 184), Spread(36, 50, 61), higher=True) == "**3.60x**"
    assert verdict(Spread(49, 50, 51), Spread(29, 30, 31), higher=False) == "0.60x: slower"


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"tokens/s, median": "1,084.8", "min": "63", "max": "1,107.9"}, Spread(63, 1084.8, 1107.9)),
        ({"min ms": "66.06", "median ms": "85.49", "max ms": "180.1", "tokens/s": "374"}, Spread(66.06, 85.49, 180.1)),
        ({"ms between tokens": "64.1", "min..max": "57..72"}, Spread(57, 64.1, 72)),
        ({"contender": "PEFT", "s": "2.16 (1.70 to 2.39)"}, Spread(1.7, 2.16, 2.39)),
        ({"median": "27,387", "spread": "27295.9..27720.5 tokens/s"}, Spread(27295.9, 27387, 27720.5)),
    ],
)
def test_every_kind_of_table_is_read(row: dict[str, str], found: Spread):
    assert spread(row) == found


def test_a_row_that_is_not_there_is_an_error():
    page = "# Numbers\n\n## How fast?\n\n| who | median ms | min..max |\n| --- | --- | --- |\n| we | 2 | 1..3 |\n"
    one = Comparison("speed", "them", "How fast?", {"who": "we"}, {"who": "they"}, higher=False)
    with pytest.raises(LookupError, match="0 rows"):
        one.line(build_figures.tables(page))


def test_every_factor_of_speed_in_the_readme_is_a_measured_one():
    text = build_figures.README.read_text(encoding="utf-8")
    written = text[text.index(build_figures.BEGIN) : text.index(build_figures.END)]
    assert not re.findall(r"\b\d+(?:\.\d+)?x\b", text.replace(written, "")), "typed by hand: let numbers.md carry it"
    assert "slower" in written or "overlap" in written, "only rows that we win?"
    assert tree.ROOT == build_figures.ROOT
