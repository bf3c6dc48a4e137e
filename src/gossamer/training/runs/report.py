"""`report.html`: what a run did, on one calm page that opens offline.

The page is made only from the run folder (`report.json`, `metrics.jsonl`, `config.yaml`), so it can be made again at
any time. No scripts, no fonts, no network; pictures are inline SVG with their numbers beside them. Colours follow the
reader's light or dark setting.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from gossamer.pages import charts
from gossamer.errors import ArtefactError
from gossamer.files.atomic import write_text
from gossamer.pages.shell import header, page, section
from gossamer.pages.sizes import amount, duration
from gossamer.training.tasks import LOSS, TASKS, Figures, measure_of, read_figures

_MOST_POINTS = 400  # a curve of more points shows no more
_MOST_EXAMPLES = 20


def write_report(folder: Path, *, spectra: Mapping[str, Sequence[float]] | None = None) -> Path:
    """Write `report.html` into a run folder, from the files that stand there; well under 2 MB for any length of run.

    Args:
        spectra: module path -> singular values of its weight change, largest first; drawn by kind of module.

    Raises: ArtefactError for a missing `report.json`, or a line of `metrics.jsonl` that is not JSON. DiskError; an older
    page is still there.
    """
    report = _read_report(folder / "report.json")
    config = folder / "config.yaml"
    sections = [
        _before_after(report),
        _loss(read_metrics(folder), report),
        _confusions(report),
        _spectra(spectra or {}),
        _examples(report.get("examples") or ()),
        _latency(report.get("latency") or {}),
        _config(config.read_text(encoding="utf-8") if config.exists() else ""),
    ]
    name = folder.resolve().name
    path = folder / "report.html"
    write_text(path, page(name, _header(name, report), *sections, _identity(report)))
    return path


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError("this run folder has no readable report.json", where=str(path), got=str(error)) from None
    if not isinstance(report, dict):
        raise ArtefactError("a report is a JSON object", where=str(path), got=type(report).__name__)
    return report


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, if there is one. Raises `ArtefactError`."""
    rows, path = [], folder / "metrics.jsonl"
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
        try:
            rows.append(json.loads(text))
        except ValueError as error:
            raise ArtefactError("not a JSON object", where=f"{path}:{line}", got=str(error)) from None
    return rows


def _header(name: str, report: Mapping[str, Any]) -> str:
    method: dict[str, Any] = report.get("method") or {}
    detail = ", ".join(
        f"{field} {charts.number(method[field])}" for field in ("r", "alpha") if method.get(field) is not None
    )
    did = f"{report.get('base', 'a base model')} with {method.get('name', 'an adapter')}" + (detail and f" ({detail})")
    return header("run report", name, did, _key_figures(report))


def _key_figures(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader wants first, as far as the report knows it."""
    trainable, total = report.get("trainable_params"), report.get("total_params")
    before, after = (_measured(report, when).named() for when in ("before", "after"))
    both = [name for name in sorted(before, key=LOSS.__eq__) if name in after]  # a loss only where there is nothing else
    figures = [(name.replace("_", " "), f"{_metric(name, before[name])} → {_metric(name, after[name])}") for name in both[:1]]
    if trainable and total:
        figures.append((f"trainable of {total / 1e6:.1f} M", f"{trainable / total:.2%}"))
    shown = (("adapter", "adapter_bytes", amount), ("time", "seconds", duration), ("peak memory", "peak_memory_bytes", amount))
    return [*figures, *((name, written(report[field])) for name, field, written in shown if report.get(field))]


def _before_after(report: Mapping[str, Any]) -> str:
    before, after = report.get("eval_before") or {}, report.get("eval_after") or {}
    names = [name for name in {**before, **after} if _is_number(before.get(name, after.get(name)))]
    if not names:
        return ""
    values = {name: (before.get(name), after.get(name)) for name in names}
    rows = [
        [name.replace("_", " "), _metric(name, then), _metric(name, now), _change(name, then, now)]
        for name, (then, now) in values.items()
    ]
    baseline = dict(report.get("baseline") or {})
    name = baseline.pop("name", "the baseline")
    baselines = [[f"{metric} of {name}", "", _metric(metric, value), ""] for metric, value in baseline.items()]
    body = charts.table(("metric", "before", "after", "change"), [*rows, *baselines])
    return section("Before and after", body, note="Measured on the held-out rows, which training never saw.")


def _metric(name: str, value: Any) -> str:
    if not _is_number(value):
        return "–"
    return f"{value:.1%}" if _is_share(name) else charts.number(value)


def _is_share(name: str) -> bool:
    measure = measure_of(name)
    return measure is not None and measure.unit == "share"


def _measured(report: Mapping[str, Any], when: str) -> Figures:
    return read_figures(report.get(f"eval_{when}") or {}, _task(report))


def _task(report: Mapping[str, Any]) -> str:
    task = report.get("task", "")
    return task if isinstance(task, str) else task["name"]


def _change(name: str, before: Any, after: Any) -> str:
    if not (_is_number(before) and _is_number(after)) or name in ("tokens", "rows", "seconds"):
        return ""
    change = f"{(after - before) * 100:+.1f} points" if _is_share(name) else f"{after - before:+.4g}"
    return change.replace("-", "\u2212", 1)


def _loss(metrics: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> str:
    """The training loss: every point faint, its running mean strong, the held-out loss as its own line."""
    trained, held_out = (
        [(row["step"], row[name]) for row in metrics if _is_number(row.get("step")) and _is_number(row.get(name))]
        for name in ("loss", "eval_loss")
    )
    if not trained:
        return ""
    ends = {"eval_before": 0, "eval_after": report.get("steps", trained[-1][0])}
    around: dict[Any, Any] = {
        step: loss for name, step in ends.items() if _is_number(loss := (report.get(name) or {}).get("loss"))
    }
    held_out = sorted((around | dict(held_out)).items())
    smooth = _running_mean(trained)
    task = TASKS.get(_task(report))
    drawn = {"each step": _thinned(trained), "training": _thinned(smooth), "held out": held_out}
    series = {name: points for name, points in drawn.items() if points}
    chart = charts.line_chart(series, "Loss", "optimiser step", task.loss_unit if task else "", faint={"each step"})
    shown = _thinned([(step, loss, mean) for (step, loss), (_, mean) in zip(trained, smooth, strict=True)], 60)
    return section("How it learned", charts.figure(chart, charts.table(("step", "loss", "running mean"), shown)))


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean of the last twentieth of the run up to each point; NaN stays visible as a gap."""
    window = max(1, len(points) // 20)
    values = [y for _, y in points]
    means = (values[max(0, index - window + 1) : index + 1] for index in range(len(values)))
    return [(x, sum(near) / len(near)) for (x, _), near in zip(points, means, strict=True)]


def _thinned(points: Sequence[Any], most: int = _MOST_POINTS) -> list[Any]:
    """At most `most` of the points, evenly spread, the last one among them."""
    stride = math.ceil(len(points) / most)
    return [*points[::stride], *([points[-1]] if stride > 1 and (len(points) - 1) % stride else [])]


def _confusions(report: Mapping[str, Any]) -> str:
    pictures = []
    for when in ("before", "after"):
        figures = _measured(report, when)
        if figures.table:
            matrix, labels = figures.table.counts, [label.strip() for label in figures.table.labels]
            name, value = next(iter(figures.named().items()))
            title = f"{when.capitalize()} training: {_metric(name, value)}"
            picture = charts.heat_map(matrix, labels, labels, title, "true", "predicted")
            rows = [[label, *values] for label, values in zip(labels, matrix, strict=True)]
            pictures.append(charts.figure(picture, charts.table(["true ↓ predicted →", *labels], rows)))
    if not pictures:
        return ""
    note = "Rows are the true answers, columns the predicted ones; shade is the share of the row."
    return section("Which is taken for which", f'<div class="pair">{"".join(pictures)}</div>', note=note)


def _spectra(spectra: Mapping[str, Sequence[float]]) -> str:
    kinds: dict[str, list[Sequence[float]]] = {}
    for path, values in spectra.items():
        kinds.setdefault(path.rsplit(".", 1)[-1], []).append(values)
    if not kinds:
        return ""
    rows = [
        [kind, len(curves), median(max(values, default=0.0) for values in curves), median(map(_effective_rank, curves))]
        for kind, curves in kinds.items()
    ]
    picture = charts.small_multiples(kinds, "Singular values of the weight changes", "index", "singular value")
    numbers = charts.table(("module", "count", "median of the largest", "median effective rank"), rows)
    note = (
        "One thin line a layer, their median strong. A flat line uses its whole rank; a steep one would do with less."
    )
    return section("What was learned, by kind of module", charts.figure(picture, numbers), note=note)


def _effective_rank(values: Sequence[float]) -> float:
    """exp of the entropy of the normalised singular values: r when all are equal. Source: Roy and Vetterli 2007."""
    total = sum(values)
    shares = [value / total for value in values if value > 0] if total > 0 else []
    return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    fields = ("prompt", "expected", "before", "after")
    rows = [[str(example.get(field, "")).strip() for field in fields] for example in examples[:_MOST_EXAMPLES]]
    return section("In its own words", f'<div class="prose">{charts.table(fields, rows)}</div>') if rows else ""


def _latency(latency: Mapping[str, Any]) -> str:
    """Numbers, or one mapping of numbers a variant (then each key is a column, the first one drawn)."""
    rows = {name: value if isinstance(value, dict) else {"milliseconds": value} for name, value in latency.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if not columns:
        return ""
    drawn = {name: row[columns[0]] for name, row in rows.items() if _is_number(row.get(columns[0]))}
    numbers = charts.table(
        ["", *columns], [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    )
    return section("Latency", charts.figure(charts.bar_chart(drawn, columns[0].replace("_", " ")), numbers))


def _config(text: str) -> str:
    note = "Resolved: running it again repeats the run."
    return section("Configuration", f"<pre>{escape(text.strip())}</pre>", note=note) if text else ""


def _identity(report: Mapping[str, Any]) -> str:
    fingerprint = report.get("base_fingerprint") or {}
    fingerprint = fingerprint.items() if isinstance(fingerprint, dict) else [("fingerprint", fingerprint)]
    own = [(f"adapter {name}", report.get(f"adapter_{name}")) for name in ("sha256", "digest")]
    rows = [*own, *((f"base {name}", value) for name, value in fingerprint)]
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows if value)
    return f'<footer><dl class="identity">{body}</dl></footer>' if body else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
