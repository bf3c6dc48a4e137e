"""The model card of an adapter: a README.md that says what it is, of what base, from what data, and how good."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from gossamer.adapter import Adapter
from gossamer.errors import UsageError
from gossamer.files.folder import read_json
from gossamer.methods.spectra import spectra
from gossamer.pages.charts import line_chart

_NAMED = 6
"""How many lines of the picture are named; the others are drawn thin."""


def model_card(
    adapter: Adapter,
    *,
    base: str,
    licence: str,
    data: Sequence[str] = (),
    report: Mapping[str, Any] | None = None,
    picture: str = "",
) -> str:
    """README.md with YAML front matter.

    Args:
        adapter: what the card is of.
        base: the base model's name on the hub, or a name that its readers know.
        licence: an identifier such as "apache-2.0".
        data: names of the data sets, as the user says them; none is guessed.
        report: a run's `report.json`; its numbers are listed.
        picture: file name of the spectrum picture beside it, if there is one.

    Raises `UsageError` for a base or licence that is empty or not one line.
    """
    for name, text in (("base", base), ("licence", licence), *(("data", one) for one in data)):
        if not text.strip() or not text.isprintable():
            raise UsageError("one line of text is needed", where=name, got=repr(text))
    front: dict[str, Any] = {
        "base_model": base,
        "library_name": "peft",
        "license": licence,
        "tags": ["lora" if adapter.spec.name in ("lora", "dora") else adapter.spec.name, "gossamer"],
    }
    if data:
        front["datasets"] = [*data]
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(front, stream)
    fields = adapter.spec.to_dict()
    facts = {
        "base": base,
        "method": fields.pop("name"),
        "numbers": f"{adapter.num_parameters:,} in {len(adapter.tensors)} modules",
        "data": ", ".join(data) or "not said",
        "digest": adapter.digest,
    }
    facts |= {key: str(fields[key]) for key in ("r", "alpha", "scaling") if key in fields}
    parts = [f"---\n{stream.getvalue()}---\n", f"# An adapter of {_plain(base)}\n", _table("what", facts)]
    numbers = _numbers(report or {})
    if numbers:
        parts.append("## Measured\n\n" + _table("metric", numbers))
    if picture:
        parts.append(f"## Spectrum\n\n![singular values of each module's change]({picture})\n")
    return "\n".join(parts)


def spectrum_picture(adapter: Adapter) -> str:
    """SVG of each module's singular values, largest first, over the largest.

    "" where nothing is changed, or where the adapter alone does not tell the change.
    """
    lines = {}
    for path, tensor in spectra(adapter).items():
        values = tensor.tolist()
        if values and values[0] > 0:
            lines[path] = [(index + 1, value / values[0]) for index, value in enumerate(values)]
    if not lines:
        return ""
    faint = [*lines][_NAMED:]
    return line_chart(lines, "Singular values of each module's change", "index", "over the largest", faint=faint)


def report_of(run: Path) -> dict[str, Any] | None:
    """The `report.json` of a run folder, or None for a plain adapter folder."""
    place = run / "report.json"
    return read_json(place) if place.is_file() else None


def _numbers(report: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The plain numbers of a report, two levels deep."""
    found: dict[str, str] = {}
    for key, value in report.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = f"{value:.6g}"
        elif isinstance(value, Mapping) and not prefix:
            found |= _numbers(value, f"{key}.")
    return found


def _table(head: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {head} | value |", "| --- | --- |", *(f"| {_plain(key)} | {_plain(rows[key])} |" for key in rows)]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that cannot leave its cell of a Markdown table, nor become a tag."""
    return re.sub(r"[\s|]+", " ", text).replace("<", "&lt;")
