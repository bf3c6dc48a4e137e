"""A plan as text for people, as one offline page with a picture, and as a dict for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.files.atomic import write_text
from gossamer.pages import charts
from gossamer.pages.shell import page, section
from gossamer.pages.sizes import count, size
from gossamer.pages.tables import aligned
from gossamer.planning.devices import GIB, UTILISATION

if TYPE_CHECKING:
    from gossamer.planning.plan import Plan

WORDS = {
    "weights": "the base",
    "adapters": "what is trained",
    "gradients": "of what is trained",
    "optimizer": "AdamW's moments",
    "activations": "kept for the backward",
    "transient": "of the running piece",
}
"""What each piece is."""


def as_text(plan: Plan) -> str:
    """The whole plan as a table."""
    return "\n\n".join(
        (
            _heading(plan),
            aligned(_parameters(plan), figures=True),
            aligned(_memory(plan), figures=True),
            aligned(_cost(plan), figures=True),
            aligned([("card", "", "verdict"), *_verdicts(plan)], figures=True),
            *(f"note: {note}" for note in plan.notes),
        )
    )


def compared(plans: Sequence[tuple[str, Plan]]) -> str:
    """Several plans beside each other: "80 GB against 16 against 6"."""
    pieces = [*plans[0][1].pieces]
    header = ("", *(name for name, _ in plans))
    body = [(piece, *(size(plan.pieces[piece]) for _, plan in plans)) for piece in pieces]
    trained = ("trained", *(count(plan.trainable) for _, plan in plans))
    total = ("peak", *(size(plan.peak) for _, plan in plans))
    disk = ("file", *(size(plan.adapter_bytes) for _, plan in plans))
    return aligned([header, trained, *body, total, disk], figures=True)


def _heading(plan: Plan) -> str:
    setting = plan.setting
    stored = f"{setting.quant}, else {setting.dtype}" if setting.quant else setting.dtype
    steps = f" x {setting.accumulation}" if setting.accumulation > 1 else ""
    return (
        f"{plan.shape.name}: {plan.tuning}, base in {stored}\n"
        f"batch {setting.batch}{steps} of {setting.sequence:,} tokens, {setting.supervised:.0%} with a label, "
        f"checkpointing {'on' if plan.checkpointing else 'off'}, {setting.optimizer}"
    )


def _parameters(plan: Plan) -> list[tuple[str, ...]]:
    counted = [(kind, f"{number:,}", "") for kind, number in plan.parameters.items()]
    total = ("all parameters", f"{plan.shape.total:,}", "")
    return [*counted, total, ("trained", f"{plan.trainable:,}", f"{plan.share:.4%}")]


def _memory(plan: Plan) -> list[tuple[str, ...]]:
    table = [(piece, size(number), WORDS[piece]) for piece, number in plan.pieces.items()]
    table.append(("peak", size(plan.peak), f"at {plan.moment.name}"))
    table.append(("all gradients", size(plan.gradients), "at the optimiser's step"))
    table.append(("head and loss", size(plan.head), "at their fullest"))
    if plan.setting.quant:
        table.append(("one matrix", size(plan.dequantisation), "rebuilt while it is used"))
    if plan.paged:
        table.append(("paged", size(plan.paged), "moments in the host's memory"))
    return table


def _cost(plan: Plan) -> list[tuple[str, ...]]:
    table = [
        ("forward", f"{plan.forward_flops / 1e9:.2f} GFLOP", "a token"),
        ("backward", f"{plan.backward_flops / 1e9:.2f} GFLOP", "a token"),
        ("checkpoint", size(plan.checkpoint_bytes), f"on disk, in {plan.setting.dtype}"),
        ("adapter", size(plan.adapter_bytes), "on disk"),
    ]
    if plan.seconds_per_token and plan.device:
        each = plan.seconds_per_token
        said = f"on {plan.device.name} at {UTILISATION:.0%} of its speed: {1 / each:,.0f} tokens a second"
        table.insert(2, ("time", f"{each * 1e6:.1f} µs", f"a token, {said}"))
    return table


def _verdicts(plan: Plan) -> list[tuple[str, ...]]:
    return [(one.device.name, size(one.device.memory), str(one)) for one in plan.verdicts()]


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything a program may want to know."""
    setting = plan.setting
    return {
        "model": plan.shape.name,
        "method": str(plan.tuning),
        "setting": {name: getattr(setting, name) for name in setting.__dataclass_fields__},
        "checkpointing": plan.checkpointing,
        "parameters": plan.parameters,
        "total": plan.shape.total,
        "trainable": plan.trainable,
        "share": plan.share,
        "bytes": plan.pieces,
        "peak": plan.peak,
        "moment": plan.moment.name,
        "moments": {moment.name: plan.always + moment.total for moment in plan.during},
        "gradients": plan.gradients,
        "activations": plan.activations,
        "head": plan.head,
        "dequantisation": plan.dequantisation,
        "paged": plan.paged,
        "flops_per_token": {"forward": plan.forward_flops, "backward": plan.backward_flops},
        "device": plan.device.name if plan.device else None,
        "seconds_per_token": plan.seconds_per_token,
        "disk": {"checkpoint": plan.checkpoint_bytes, "adapter": plan.adapter_bytes},
        "verdicts": [
            {"device": one.device.name, "memory": one.device.memory, "fits": one.fits, "change": one.change}
            | ({"peak": one.plan.peak} if one.plan else {})
            for one in plan.verdicts()
        ],
        "notes": [*plan.notes],
    }


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
        for hue, (piece, nbytes) in zip(_HUES, parts.items(), strict=True):
            body.append(
                f'<rect x="{x:.1f}" y="{y}" width="{nbytes * scale:.1f}" height="{_BAR}" fill="{hue}">'
                f"<title>{escape(piece)}: {size(nbytes)}</title></rect>"
            )
            x += nbytes * scale
        body.append(f'<text x="{x + 8:.1f}" y="{y + 15}" fill="currentColor">{size(sum(parts.values()))}</text>')
    for card in (8, 16, 24, 48, 80):
        x = _LEFT + card * GIB * scale
        if x <= charts.WIDTH - _RIGHT:
            line = f'x1="{x:.1f}" y1="18" x2="{x:.1f}" y2="{height - 6}"'
            body.append(f'<line {line} stroke="currentColor" stroke-dasharray="3 3" opacity="0.5"/>')
            body.append(f'<text x="{x:.1f}" y="13" text-anchor="middle" fill="currentColor">{card} GB</text>')
    described = "; ".join(f"{name}: {size(sum(parts.values()))}" for name, parts in bars.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {charts.WIDTH} {height}" role="img" width="100%" '
        f'style="font:12px system-ui,sans-serif"><title>{escape(title)}</title><desc>{escape(described)}</desc>'
        f"{''.join(body)}</svg>"
    )


def _legend() -> str:
    items = (
        f'<li><i style="background:{hue}"></i>{piece}: {escape(words)}</li>'
        for hue, (piece, words) in zip(_HUES, WORDS.items(), strict=True)
    )
    return f"<ul>{''.join(items)}</ul>"
