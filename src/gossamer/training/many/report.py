"""`sweep.html`: the runs of a sweep or a fleet on one offline page, and the same as rows of text."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.files.atomic import write_text
from gossamer.pages import charts
from gossamer.pages.shell import header, page, section
from gossamer.pages.sizes import duration
from gossamer.training.runs.report import read_metrics
from gossamer.training.tasks import Measure, measure_of, read_figures

Results = Sequence[Mapping[str, Any]]


def write_sweep_report(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write `sweep.html` (or `fleet.html`) into a folder, from what `run_plan` returns. Raises `DiskError`."""
    kind, rows = result["kind"], result["runs"]
    done = [row for row in rows if "error" not in row]
    title = folder.resolve().name
    figures = [("runs", str(len(rows))), ("time", duration(result["seconds"]))]
    if result["best"]:
        found = next(row for row in done if row["name"] == result["best"])
        figures[:0] = [("best", result["best"]), (f"its {result['metric']}", _shown(_figure(found, "eval_after")))]
    if len(done) < len(rows):
        figures.append(("failed", str(len(rows) - len(done))))
    did = f"{len(rows)} adapters on {result['base']}, trained together on one frozen base"
    path = folder / f"{kind}.html"
    sections = _table(result), _bars(done), *_curves(done), _failures(rows)
    write_text(path, page(title, header(f"{kind} report", title, did, figures), *sections))
    return path


def as_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A header and one row a run: its settings, and those figures that there are; of a rehearsal there are few."""
    rows = result["runs"]
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    metric = _metric(rows)
    there = {field for row in rows for field, value in row.items() if value is not None}
    figures: list[tuple[str, str, Callable[[Mapping[str, Any]], str]]] = [
        ("trainable", "trainable_params", lambda row: f"{row['trainable_params']:,}"),
        ("steps", "steps", lambda row: f"{row['steps']:,}"),
        ("train loss", "train_loss", lambda row: _shown(row["train_loss"])),
        (f"{metric} before", "eval_before", lambda row: _shown(_figure(row, "eval_before"))),
        ("after", "eval_after", lambda row: _shown(_figure(row, "eval_after"))),
        ("seconds", "seconds", lambda row: f"{row['seconds']:.1f}"),
        ("", "output", lambda row: "best" if row["name"] == result["best"] else ""),
    ]
    shown = {name: written for name, field, written in figures if field in there}
    lines = [("name", *keys, *shown)]
    for row in rows:
        own = (str(row["settings"].get(key, "")) for key in keys)
        failed = ("failed", *[""] * (len(shown) - 1))
        lines.append((row["name"], *own, *(failed if "error" in row else (one(row) for one in shown.values()))))
    return lines


def train_loss(run: Path) -> float | None:
    """The training loss at the end of a run: the mean over the last twentieth of its logged steps."""
    losses = [one["loss"] for one in read_metrics(run) if one.get("loss") is not None]
    last = losses[-max(1, len(losses) // 20) :]
    return sum(last) / len(last) if last else None


def _metric(rows: Results) -> str:
    measured = [row["eval_after"] for row in rows if row.get("eval_after")]
    return read_figures(measured[0]).headline.name if measured else ""


def _figure(row: Mapping[str, Any], when: str) -> float | None:
    figures = read_figures(row[when]) if row.get(when) else None
    return figures and figures.measures[figures.headline]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(result: Mapping[str, Any]) -> str:
    head, *rows = as_rows(result)
    chosen = f"Best by {result['metric']} on the held-out rows: {result['best']}." if result["best"] else ""
    return section("Every run", charts.table(head, rows), note=chosen)


def _bars(done: Results) -> str:
    metric = _metric(done)
    values = {row["name"]: value for row in done if (value := _figure(row, "eval_after")) is not None}
    if not values:
        return ""
    measure = measure_of(metric) or Measure(metric)
    ordered = dict(sorted(values.items(), key=lambda item: measure.cost(item[1])))
    picture = charts.bar_chart(ordered, f"Held-out {metric} after training")
    return section("Side by side", charts.figure(picture, charts.table(("run", metric), [*ordered.items()])))


def _curves(done: Results) -> list[str]:
    """How the figure goes with each number that was varied, one line for each combination of the other settings."""
    metric = _metric(done)
    keys = list(dict.fromkeys(key for row in done for key in row["settings"]))
    parts = []
    for key in keys if metric else ():
        values = [row["settings"].get(key) for row in done]
        numbers = {value for value in values if isinstance(value, int | float) and not isinstance(value, bool)}
        if len(numbers) < 2:
            continue
        scaled = min(numbers) > 0 and max(numbers) / min(numbers) >= 10
        series: dict[str, list[tuple[float, float]]] = {}
        for row in done:
            value, figure = row["settings"].get(key), _figure(row, "eval_after")
            if value in numbers and figure is not None:
                settings = row["settings"].items()
                others = ", ".join(f"{name.rpartition('.')[2]} {own}" for name, own in settings if name != key)
                series.setdefault(others or metric, []).append((math.log10(value) if scaled else value, figure))
        series = {name: sorted(points) for name, points in series.items()}
        label = f"log10 {key}" if scaled else key
        picture = charts.line_chart(series, f"Held-out {metric} by {key}", label, metric)
        lines = [(name, *point) for name, points in series.items() for point in points]
        table = charts.table(("other settings", label, metric), lines)
        parts.append(section(f"By {key}", charts.figure(picture, table)))
    return parts


def _failures(rows: Results) -> str:
    failed = [(row["name"], row["error"]["code"], row["error"]["what"]) for row in rows if "error" in row]
    table = charts.table(("run", "error", "what"), failed)
    return section("Failed", f'<div class="prose">{table}</div>') if failed else ""
