"""Numbers to pictures: inline SVG text with nothing around it.

Every function is pure: numbers in, text out. The pictures take their ink from `currentColor` and their few hues from
CSS variables (`--series-1` ... `--series-6`, and `--heat` for shades that text stands on) with fallbacks, so that one
drawing serves a light page, a dark page and a file of its own. Each carries a `<title>` and a `<desc>`; `figure` puts
the same numbers beside it as a table, for those who do not see pictures. Coordinates are in user units; a chart is
`WIDTH` wide and scales with its page.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from statistics import median

WIDTH = 640
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 84, 34, 40  # room for tick labels, end labels, the title and the axis label
_HUES = ("#2f6f8f", "#b4632a", "#5f8a3a", "#8a5a94", "#a8862a", "#5b6b7a")

Points = Sequence[tuple[float, float]]


def line_chart(
    series: Mapping[str, Points], title: str, x_label: str = "", y_label: str = "", *, faint: Collection[str] = ()
) -> str:
    """Lines over a shared pair of axes, each named at its right end instead of in a legend.

    Args:
        series: name -> (x, y) points in drawing order. A NaN or an infinity breaks the line there.
        title: what the picture shows; also its accessible name.
        x_label: the x axis' quantity and unit.
        y_label: the y axis' quantity and unit.
        faint: names drawn thin and unlabelled, as the raw data behind a smoothed line.
    """
    points = [point for line in series.values() for point in line if all(map(math.isfinite, point))]
    height, top = 290, _TOP + (16 if y_label else 0)
    if not points:
        return _svg(
            height, title, "No finite point to draw.", [_text(WIDTH / 2, height / 2, "no data", anchor="middle")]
        )
    x_axis = _Axis([x for x, _ in points], _LEFT, WIDTH - _RIGHT, tight=True)
    y_axis = _Axis([y for _, y in points], height - _BOTTOM, top)
    body = _grid(x_axis, y_axis, x_label, y_label)
    ends: list[tuple[float, str, str]] = []
    for index, (name, line) in enumerate(series.items()):
        loud = name not in faint
        hue = _hue(sum(other not in faint for other in list(series)[:index]))
        placed = [(x_axis(x), y_axis(y)) if math.isfinite(x) and math.isfinite(y) else None for x, y in line]
        body.append(_path(placed, hue, width=1.6 if loud else 0.8, opacity=1 if loud else 0.35))
        last = next((point for point in reversed(placed) if point), None)
        if loud and last:
            ends.append((last[1], name, hue))
    body += [_text(WIDTH - _RIGHT + 8, y + 4, name, fill=hue) for y, name, hue in _apart(ends, 15)]
    described = "; ".join(f"{name}: {_range_of(line)}" for name, line in series.items())
    return _svg(height, title, described, body)


def bar_chart(bars: Mapping[str, float], title: str, x_label: str = "") -> str:
    """Horizontal bars from zero, each with its name to the left and its value at its end.

    Args:
        bars: name -> value, zero or more; a NaN or an infinity is written as text without a bar.
        title: what the picture shows; also its accessible name.
        x_label: the quantity and unit of the values.
    """
    left = min(220, 24 + 7 * max((len(name) for name in bars), default=0))
    longest = max((value for value in bars.values() if math.isfinite(value)), default=0) or 1
    body: list[str] = []
    top = _TOP + 6
    for row, (name, value) in enumerate(bars.items()):
        y = top + row * 30
        length = max(0, value) / longest * (WIDTH - left - 90) if math.isfinite(value) else 0
        body.append(_text(left - 10, y + 13, _shortened(name, left // 7), anchor="end"))
        body.append(
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="18" rx="1.5" fill="{_hue(0)}" opacity="0.85"/>'
        )
        body.append(_text(left + length + 8, y + 13, number(value)))
    height = top + 30 * max(1, len(bars)) + (18 if x_label else 0)
    body.append(_text(left, height - 6, x_label, quiet=True) if x_label else "")
    return _svg(height, title, "; ".join(f"{name}: {number(value)}" for name, value in bars.items()), body)


def heat_map(
    matrix: Sequence[Sequence[float]], row_labels: Sequence[str], column_labels: Sequence[str], title: str = "",
    row_title: str = "", column_title: str = "",
) -> str:  # fmt: skip
    """A table of cells shaded by their share of their row, as for a confusion matrix whose rows are the truth.

    The diagonal of a square matrix with equal labels is outlined.

    Args:
        matrix: one row of non-negative values a row label.
        row_labels: names down the left side.
        column_labels: names along the top.
        title: what the picture shows; also its accessible name.
        row_title: what a row stands for ("true").
        column_title: what a column stands for ("predicted").

    Raises:
        ValueError: the matrix does not have the shape that the labels say.
    """
    if len(matrix) != len(row_labels) or any(len(row) != len(column_labels) for row in matrix):
        raise ValueError(f"a {len(row_labels)} x {len(column_labels)} matrix was announced by its labels")
    left = 34 + 7 * max((len(label) for label in row_labels), default=0)
    size, top = min(64, (WIDTH - left - 8) / max(1, len(column_labels))), _TOP + 38
    width, height = max(left + size * len(column_labels) + 8, 240), top + 34 * len(row_labels) + 10
    square = list(row_labels) == list(column_labels)
    body = [_text(left + size * len(column_labels) / 2, top - 26, column_title, anchor="middle", quiet=True)]
    body += [
        _text(left + size * (column + 0.5), top - 8, _shortened(label, int(size // 6.5)), anchor="middle")
        for column, label in enumerate(column_labels)
    ]
    turned = f'transform="rotate(-90 12 {top + 17 * len(row_labels):.1f})"'
    body.append(_text(12, top + 17 * len(row_labels), row_title, anchor="middle", quiet=True, extra=turned))
    for row, (label, values) in enumerate(zip(row_labels, matrix, strict=True)):
        y = top + 34 * row
        body.append(_text(left - 8, y + 21, label, anchor="end"))
        total = sum(values) or 1
        for column, value in enumerate(values):
            body.append(_cell(left + size * column, y, size, value, value / total, square and row == column))
    described = "; ".join(
        f"{label}: " + ", ".join(f"{name} {number(value)}" for name, value in zip(column_labels, values, strict=True))
        for label, values in zip(row_labels, matrix, strict=True)
    )
    return _svg(height, title, described, body, width=width)


def small_multiples(
    panels: Mapping[str, Sequence[Sequence[float]]], title: str, x_label: str = "", y_label: str = ""
) -> str:
    """Small panels on one scale: every curve of a panel thin, their median strong. Made for spectra by module kind.

    Args:
        panels: panel name -> curves; a curve's values stand at x = 1, 2, 3, ...
        title: what the picture shows; also its accessible name.
        x_label: the shared x axis' quantity.
        y_label: the shared y axis' quantity.
    """
    values = [y for curves in panels.values() for curve in curves for y in curve if math.isfinite(y)]
    if not values:
        return _svg(80, title, "No finite value to draw.", [_text(WIDTH / 2, 54, "no data", anchor="middle")])
    across = min(4, len(panels))
    cell_width, cell_height = (WIDTH - 36) / across, 118
    longest = max(len(curve) for curves in panels.values() for curve in curves)
    body: list[str] = []
    top = _TOP + 14
    for index, (name, curves) in enumerate(panels.items()):
        x0, y0 = 36 + index % across * cell_width, top + index // across * cell_height
        x_axis = _Axis([1, max(2, longest)], x0 + 4, x0 + cell_width - 18, tight=True)
        y_axis = _Axis([0, *values], y0 + cell_height - 32, y0 + 10, tight=True)
        body += _panel(name, curves, x_axis, y_axis, label_y=index % across == 0)
    rows = math.ceil(len(panels) / across)
    height = top + rows * cell_height + 14
    caption = " · ".join(
        text for text in (f"across: {x_label}" if x_label else "", f"up: {y_label}" if y_label else "") if text
    )
    body.append(_text(36, height - 6, caption, quiet=True))
    described = "; ".join(
        f"{name}: {len(curves)} curves, median starts at {number(_medians(curves)[0])}"
        for name, curves in panels.items()
        if curves
    )
    return _svg(height, title, described, body)


def table(header: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """An HTML table; floats are written by `number`, all text is escaped, numbers are marked `class="number"`."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join("<tr>" + "".join(_table_cell(value) for value in row) + "</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def figure(svg: str, numbers: str, summary: str = "as a table") -> str:
    """A picture with its numbers (from `table`) folded beneath it; opens without JavaScript."""
    return f"<figure>{svg}<details><summary>{escape(summary)}</summary>{numbers}</details></figure>"


def number(value: object) -> str:
    """A number as a person writes it: whole numbers whole with thousands apart, others with about four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(value, "NaN")
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2e}"


class _Axis:
    """A linear map from data to coordinates, with its round tick values in `ticks`."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, tight: bool = False) -> None:
        low, high = min(values), max(values)
        if low == high:
            low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
        step = _round_step((high - low) / 4)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if not tight:
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            low, high = first * step, last * step
        self.ticks = [index * step for index in range(first, last + 1)]
        self.start, self.end, self._low, self._high = start, end, low, high

    def __call__(self, value: float) -> float:
        return self.start + (value - self._low) / (self._high - self._low) * (self.end - self.start)


def _round_step(raw: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> list[str]:
    """Hairlines at the y ticks, a base line, tick labels and the two axis labels."""
    body: list[str] = []
    for tick in y_axis.ticks:
        y = y_axis(tick)
        body.append(_rule(x_axis.start, y, x_axis.end, y))
        body.append(_text(x_axis.start - 8, y + 4, number(tick), anchor="end", quiet=True))
    for tick in x_axis.ticks:
        body.append(_rule(x_axis(tick), y_axis.start, x_axis(tick), y_axis.start + 4, opacity=0.4))
        body.append(_text(x_axis(tick), y_axis.start + 17, number(tick), anchor="middle", quiet=True))
    body.append(_text((x_axis.start + x_axis.end) / 2, y_axis.start + 34, x_label, anchor="middle", quiet=True))
    body.append(_text(x_axis.start, y_axis.end - 10, y_label, quiet=True))
    return body


def _panel(name: str, curves: Sequence[Sequence[float]], x_axis: _Axis, y_axis: _Axis, *, label_y: bool) -> list[str]:
    """One panel of `small_multiples`."""
    body = [_text(x_axis.start, y_axis.end - 6, f"{name}", weight=600)]
    body.append(_rule(x_axis.start, y_axis.start, x_axis.end, y_axis.start, opacity=0.35))
    highest = y_axis.ticks[-1]
    body.append(_rule(x_axis.start, y_axis(highest), x_axis.end, y_axis(highest)))
    if label_y:
        body += [
            _text(x_axis.start - 6, y_axis(tick) + 4, number(tick), anchor="end", quiet=True) for tick in (0, highest)
        ]
    for curve in curves:
        body.append(_path(_stations(curve, x_axis, y_axis), _hue(0), width=0.6, opacity=0.25))
    body.append(_path(_stations(_medians(curves), x_axis, y_axis), _hue(0), width=1.8))
    return body


def _stations(curve: Sequence[float], x_axis: _Axis, y_axis: _Axis) -> list[tuple[float, float] | None]:
    return [(x_axis(x), y_axis(y)) if math.isfinite(y) else None for x, y in enumerate(curve, 1)]


def _medians(curves: Sequence[Sequence[float]]) -> list[float]:
    """The median of the curves at each station that any of them reaches."""
    reach = max((len(curve) for curve in curves), default=0)
    columns = ([curve[i] for curve in curves if i < len(curve) and math.isfinite(curve[i])] for i in range(reach))
    return [median(column) if column else math.nan for column in columns] or [math.nan]


def _path(points: Sequence[tuple[float, float] | None], hue: str, *, width: float, opacity: float = 1) -> str:
    """One stroke through the points; `None` lifts the pen, a lone point becomes a dot."""
    present = [point for point in points if point]
    if len(present) == 1:
        place = f'cx="{present[0][0]:.1f}" cy="{present[0][1]:.1f}" r="{width + 1:.1f}"'
        return f'<circle {place} fill="{hue}" opacity="{opacity:g}"/>'
    moves: list[str] = []
    down = False
    for point in points:
        if point:
            moves.append(f"{'L' if down else 'M'}{point[0]:.1f} {point[1]:.1f}")
        down = point is not None
    style = f'fill="none" stroke="{hue}" stroke-width="{width:g}" stroke-linejoin="round" stroke-linecap="round"'
    return f'<path d="{"".join(moves)}" {style} opacity="{opacity:g}"/>'


def _cell(x: float, y: float, size: float, value: float, share: float, outlined: bool) -> str:
    """One cell of a heat map; `--heat` is chosen so that the page's ink stays readable on its full shade."""
    share = share if math.isfinite(share) else 0
    box = f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{size - 2:.1f}" height="32" rx="2"'
    ring = ' stroke="currentColor" stroke-opacity="0.6" stroke-width="1"' if outlined else ""
    shade = f'{box} fill="var(--heat, #7fb3cc)" fill-opacity="{0.06 + 0.94 * share:.2f}"{ring}/>'
    return shade + _text(x + size / 2, y + 21, number(value), anchor="middle", quiet=not value)


def _apart(labels: list[tuple[float, str, str]], gap: float) -> list[tuple[float, str, str]]:
    """Labels sorted downwards and pushed apart until neighbours are at least `gap` from each other."""
    placed: list[tuple[float, str, str]] = []
    for y, name, hue in sorted(labels):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, name, hue))
    return placed


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", fill: str = "currentColor", quiet: bool = False,
    weight: int = 400, extra: str = "",
) -> str:  # fmt: skip
    shade = ' opacity="0.62"' if quiet else ""
    bold = f' font-weight="{weight}"' if weight != 400 else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}"{shade}{bold} {extra}>{escape(text)}</text>'
    )


def _rule(x1: float, y1: float, x2: float, y2: float, opacity: float = 0.13) -> str:
    line = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {line} stroke="currentColor" stroke-width="1" opacity="{opacity:g}"/>'


def _svg(height: float, title: str, description: str, body: Sequence[str], *, width: float = WIDTH) -> str:
    """The frame every picture shares."""
    head = _text(0, 14, title, weight=600, extra='style="font-size:13.5px"') if title else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" width="100%" '
        f'style="max-width:{width * 1.15:.0f}px;font:12px system-ui,sans-serif;font-variant-numeric:tabular-nums">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{head}{''.join(body)}</svg>"
    )


def _hue(index: int) -> str:
    return f"var(--series-{index % len(_HUES) + 1}, {_HUES[index % len(_HUES)]})"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= max(3, length) else text[: max(2, length - 1)] + "…"


def _range_of(line: Points) -> str:
    finite = [y for _, y in line if math.isfinite(y)]
    return f"{len(line)} points, from {number(finite[0])} to {number(finite[-1])}" if finite else "no finite point"


def _table_cell(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td class="number">{number(value)}</td>'
    return f"<td>{escape(str(value))}</td>"
