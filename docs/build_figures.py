"""The README's comparisons with other libraries, taken from docs/numbers.md and worded by what the ranges carry.

A factor is given only where the ranges of the two contenders part; where they overlap the table says so, and a row
where we lose stands beside those where we win. So nobody types a figure, and none outlives what was measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, NUMBERS = ROOT / "README.md", ROOT / "docs" / "numbers.md"
BEGIN, END = "<!-- Comparisons: written by `make docs` from docs/numbers.md -->", "<!-- End of the comparisons -->"

Row = Mapping[str, str]


@dataclass(frozen=True)
class Spread:
    """What one contender took or reached: lowest, middle and highest of its rounds."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One line of the README.

    Attributes:
        what: the words of the line, unit included.
        peer: whom we are compared with.
        question: the heading in numbers.md under which both rows stand.
        ours, theirs: column -> value, enough to name one row each.
        higher: whether more is better, as with tokens a second; else less is, as with milliseconds.
    """

    what: str
    peer: str
    question: str
    ours: Row
    theirs: Row
    higher: bool

    def line(self, tables: Mapping[str, Sequence[Row]]) -> str:
        """The line of the table. Raises `LookupError` where numbers.md does not have exactly one such row."""
        ours, theirs = (spread(self._row(tables, chosen)) for chosen in (self.ours, self.theirs))
        return (
            f"| {self.what} | {self.peer} | {_range(ours)} | {_range(theirs)} | {verdict(ours, theirs, self.higher)} |"
        )

    def _row(self, tables: Mapping[str, Sequence[Row]], chosen: Row) -> Row:
        found = [row for row in tables.get(self.question, ()) if chosen.items() <= row.items()]
        if len(found) != 1:
            raise LookupError(f"numbers.md: {self.question!r} has {len(found)} rows of {dict(chosen)}, expected one")
        return found[0]


def verdict(ours: Spread, theirs: Spread, higher: bool) -> str:
    """How many times as fast we are, by the medians, if the ranges part."""
    if ours.low <= theirs.high and theirs.low <= ours.high:
        return "ranges overlap"
    factor = ours.median / theirs.median if higher else theirs.median / ours.median
    return f"**{factor:.2f}x**" if factor > 1 else f"{factor:.2f}x: slower"


def spread(row: Row) -> Spread:
    """The three figures of a row of any table, whichever of the four ways of writing them it has."""
    if "s" in row:  # "2.33 (2.11 to 2.84)"
        return Spread(*(_number(re.findall(r"[\d.,]+", row["s"])[place]) for place in (1, 0, 2)))
    bounds = next((row[name] for name in ("min..max", "spread") if name in row), None)
    low, high = bounds.split(" ")[0].split("..") if bounds else (_either(row, "min"), _either(row, "max"))
    names = ("tokens/s, median", "median ms", "ms between tokens", "median")
    return Spread(_number(low), _number(next(row[name] for name in names if name in row)), _number(high))


def _either(row: Row, name: str) -> str:
    return next(row[column] for column in (name, f"{name} ms") if column in row)


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _range(one: Spread) -> str:
    digits = 0 if one.high >= 20 else 2 if one.high < 10 else 1
    return f"{one.low:,.{digits}f} to {one.high:,.{digits}f}"


def tables(page: str) -> dict[str, list[Row]]:
    """Heading -> the rows of the table below it, each as column -> text."""
    found: dict[str, list[Row]] = {}
    for section in page.split("\n## ")[1:]:
        cells = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in section.splitlines()
            if line.startswith("|") and not re.fullmatch(r"[|\s:-]+", line)
        ]
        if cells:
            found[section.split("\n", 1)[0]] = [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
    return found


TRAINING = "How many tokens a second does each library train, and in how much memory?"
MIXED = "What does another adapter in every row cost?"
HTTP = "How many tokens a second come over HTTP, beside vLLM and llama.cpp?"
MERGING = "What does merging cost?"
GPU = "Is everything that is made for a GPU right there, and how fast is it?"


def _training(rows: str, what: str, ours: str, peers: Mapping[str, str]) -> list[Comparison]:
    here = {"rows": rows, "dtype": "float32"}
    return [
        Comparison(what, peer, TRAINING, here | {"trainer": ours}, here | {"trainer": label}, higher=True)
        for peer, label in peers.items()
    ]


def _mixed(requests: str, what: str) -> list[Comparison]:
    here = {"dtype": "bfloat16", "requests": requests, "adapters": requests, "what": "a decoding step"}
    return [
        Comparison(
            f"{what}, {modules.replace('q, v', 'q and v')}",
            "PEFT, mixed batch",
            MIXED,
            here | {"adapters on": modules, "contender": "Gossamer"},
            here | {"adapters on": modules, "contender": "PEFT, mixed batch"},
            higher=False,
        )
        for modules in ("q, v", "all linear")
    ]


def _http(requests: str, adapters: str, what: str, peers: Sequence[str]) -> list[Comparison]:
    kind = "base alone" if adapters == "0" else "uniform"
    here = {"dtype": "bfloat16", "requests": requests, "adapters": adapters, "popularity": kind}
    return [
        Comparison(what, peer, HTTP, here | {"server": "Gossamer"}, here | {"server": peer}, higher=False)
        for peer in peers
    ]


def _merging(what: str, ours: str) -> Comparison:
    here = {"what": f"smollm2-135m, float32, {what}"}
    sides = here | {"contender": ours}, here | {"contender": "PEFT"}
    return Comparison(f"{what}, 135M, s", "PEFT", MERGING, *sides, higher=False)


def _gpu(shape: str, rows: str, ours: str, peers: Sequence[str]) -> list[Comparison]:
    return [
        Comparison(
            f"H200, {shape.upper()} shapes, {'uneven instructions' if rows == 'instructions' else rows}, tokens/s",
            peer,
            GPU,
            {"what": f"{shape}, {rows}: {ours}"},
            {"what": f"{shape}, {rows}: {peer}"},
            higher=True,
        )
        for peer in peers
    ]


PLAIN = {"PEFT, plain loop": "PEFT, plain loop"}
TRL = {
    "TRL, defaults (it checkpoints)": "TRL, defaults",
    "TRL, no checkpointing": "TRL, no checkpointing",
}
COMPARISONS: tuple[Comparison, ...] = (
    *_training("instructions", "training, uneven instructions, tokens/s", "+ shared prefix", PLAIN | TRL),
    *_training("full rows", "training, full rows, all of it learned, tokens/s", "+ packing", PLAIN),
    *_mixed("32", "decoding 32 requests with 32 adapters, ms a step"),
    *_http("1", "1", "over HTTP, one request, ms a token", ("vLLM", "llama.cpp")),
    *_http("8", "8", "over HTTP, 8 requests with 8 adapters, ms a token", ("vLLM",)),
    *_http("32", "8", "over HTTP, 32 requests with 8 adapters, ms a token", ("vLLM",)),
    *_http("32", "32", "over HTTP, 32 requests with 32 adapters, ms a token", ("vLLM",)),
    *_http("8", "0", "over HTTP, 8 requests of the base alone, ms a token", ("vLLM", "llama.cpp")),
    *_http("32", "0", "over HTTP, 32 requests of the base alone, ms a token", ("vLLM", "llama.cpp")),
    _merging("folder to folder", "Gossamer, samples read again"),
    _merging("merge and unmerge in memory", "Gossamer"),
    *_gpu("1b", "instructions", "+ shared prefix", ("TRL, defaults", "PEFT and Liger")),
    *_gpu("8b", "instructions", "+ shared prefix", ("TRL, defaults", "PEFT and Liger")),
    *_gpu("8b", "full rows", "+ packing", ("TRL, defaults", "PEFT and Liger")),
)


def comparisons(page: str) -> str:
    """The README's table, from the text of numbers.md."""
    measured = tables(page)
    head = "| | compared with | Gossamer | theirs | |\n| --- | --- | --- | --- | --- |"
    return "\n".join([head, *(one.line(measured) for one in COMPARISONS)])


def readme() -> str:
    """README.md with its comparisons as numbers.md has them."""
    text = README.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise LookupError(f"README.md has no place for the comparisons: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{comparisons(NUMBERS.read_text(encoding='utf-8'))}\n\n{END}{after}"
