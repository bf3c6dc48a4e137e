"""The frame of every page that is written: one offline file, without scripts, fonts or network."""

from collections.abc import Sequence
from html import escape
from importlib import resources


def page(title: str, *parts: str, style: str = "") -> str:
    """A whole page of HTML parts in the library's style; empty parts are left out."""
    style = resources.files("gossamer.pages").joinpath("report.css").read_text(encoding="utf-8") + style
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)} · Gossamer</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<style>{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def header(kind: str, name: str, did: str, figures: Sequence[tuple[str, str]]) -> str:
    """A page's name, one sentence on what was done, and the strip of key figures."""
    strip = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in figures)
    return (
        f'<header><p class="eyebrow">Gossamer · {escape(kind)}</p><h1>{escape(name)}</h1>'
        f'<p class="deck">{escape(did)}</p><dl class="figures">{strip}</dl></header>'
    )


def section(title: str, *body: str, note: str = "") -> str:
    """A part of a page under its own heading."""
    remark = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{remark}{''.join(body)}</section>"
