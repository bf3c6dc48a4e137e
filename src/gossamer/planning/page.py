"""A plan as one offline page: the picture of what lies in memory, and the tables."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.files.atomic import write_text
from gossamer.pages import charts
from gossamer.pages.shell import page, section
from gossamer.pages.sizes import size
from gossamer.planning.devices import GIB
from gossamer.planning.table import WORDS, as_text

if TYPE_CHECKING:
    from gossamer.planning.plan import Plan

_HUES = ("#2f6f8f", "#b4632a", "#5f8a3a", "#8a5a94", "#a8862a", "#5b6b7a")
_LEFT, _RIGHT, _BAR, _STEP = 150, 80, 22, 34
_STYLE = """
li { list-style: none; display: inline-block; margin-right: 1.2rem; }
li i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; } ul { padding: 0; }
"""


def write_page(plan: Plan, path: Path) -> Path:
    """Write the page. Raises `DiskError`."""
    bars = {"this plan": plan.pieces}
    ladder = [one for one in plan.verdicts() if one.plan and not one.fits]
    bars |= {f"for {one.device.name}": one.plan.pieces for one in ladder if one.plan}
    title = f"{plan.shape.name}: {plan.tuning}"
    numbers = charts.table(
        ("", *WORDS, "peak"),
        [(name, *map(size, parts.values()), size(sum(parts.values()))) for name, parts in bars.items()],
    )
    changes = "".join(f"<p><b>{escape(one.device.name)}</b>: {escape(str(one))}</p>" for one in plan.verdicts())
    picture = charts.figure(stacked_bars(bars, "Memory at the fullest moment"), numbers) + _legend()
    parts = (picture, section("Cards", changes), section("The plan", f"<pre>{escape(as_text(plan))}</pre>"))
    write_text(path, page(title, f"<h1>{escape(title)}</h1>", *parts, style=_STYLE))
    return path


def stacked_bars(bars: Mapping[str, Mapping[str, int]], title: str) -> str:
    """Horizontal bars of pieces in bytes, on one scale, with lines at the usual sizes of cards.

    Args:
        bars: name -> piece -> bytes.
        title: what the picture shows; also its accessible name.
    """
    longest = max(sum(parts.values()) for parts in bars.values()) or 1
    scale, height = (charts.WIDTH - _LEFT - _RIGHT) / longest, 30 + _STEP * len(bars)
    body = []
    for row, (name, parts) in enumerate(bars.items()):
        x, y = float(_LEFT), 24 + row * _STEP
        body.append(f'<text x="{_LEFT - 10}" y="{y + 15}" text-anchor="end" fill="currentColor">{escape(name)}</text>')
        for hue, (piece, count) in zip(_HUES, parts.items(), strict=True):
            body.append(
                f'<rect x="{x:.1f}" y="{y}" width="{count * scale:.1f}" height="{_BAR}" fill="{hue}">'
                f"<title>{escape(piece)}: {size(count)}</title></rect>"
            )
            x += count * scale
        body.append(f'<text x="{x + 8:.1f}" y="{y + 15}" fill="currentColor">{size(sum(parts.values()))}</text>')
    for card in (8, 16, 24, 48, 80):
        x = _LEFT + card * GIB * scale
        if x <= charts.WIDTH - _RIGHT:
            line = f'x1="{x:.1f}" y1="18" x2="{x:.1f}" y2="{height - 6}"'
            body.append(f'<line {line} stroke="currentColor" stroke-dasharray="3 3" opacity="0.5"/>')
            body.append(f'<text x="{x:.1f}" y="13" text-anchor="middle" fill="currentColor">{card} GB</text>')
    told = "; ".join(f"{name}: {size(sum(parts.values()))}" for name, parts in bars.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {charts.WIDTH} {height}" role="img" width="100%" '
        f'style="font:12px system-ui,sans-serif"><title>{escape(title)}</title><desc>{escape(told)}</desc>'
        f"{''.join(body)}</svg>"
    )


def _legend() -> str:
    items = (
        f'<li><i style="background:{hue}"></i>{piece}: {escape(words)}</li>'
        for hue, (piece, words) in zip(_HUES, WORDS.items(), strict=True)
    )
    return f"<ul>{''.join(items)}</ul>"
