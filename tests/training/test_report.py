"""report.html: one offline file that shows what report.json and metrics.jsonl hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gossamer.errors import ArtefactError
from gossamer.training.runs.report import write_report

REPORT = {
    "base": "toy<base>",
    "method": {"name": "lora", "r": 4, "alpha": 8.0},
    "task": "classify",
    "trainable_params": 100,
    "total_params": 10_000,
    "eval_before": {"accuracy": 0.25, "loss": 2.0, "labels": [" a", " b"], "confusion": [[1, 3], [2, 0]]},
    "eval_after": {"accuracy": 0.75, "loss": 0.5, "labels": [" a", " b"], "confusion": [[3, 1], [0, 2]]},
    "examples": [{"prompt": "<b>bold</b>", "expected": " a", "before": " b", "after": " a"}],
    "baseline": {"name": "word <counts>", "accuracy": 0.5},
    "latency": {"base": 10.0, "unmerged": 14.0, "merged": 10.1},
    "peak_memory_bytes": 2**30,
    "tokens_per_second": 123.0,
    "adapter_bytes": 4000,
    "adapter_sha256": "f" * 64,
    "base_fingerprint": {"architecture": "Toy", "shapes": "s", "weights": "w"},
    "seconds": 61.0,
}


class Text(HTMLParser):
    """Collects text and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags = "", []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page(folder: Path, report: dict) -> Text:
    (folder / "report.json").write_text(json.dumps(report))
    parsed = Text()
    parsed.feed(
        write_report(folder, spectra={"layers.0.q_proj": [2.0, 1.0], "layers.1.q_proj": [1.0, 0.5]}).read_text()
    )
    return parsed


def test_it_shows_the_run(tmp_path: Path):
    lines = [{"step": step, "loss": 3 / step, "lr": 1e-3, "tokens_per_second": 100.0} for step in range(1, 1001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text("base: toy<base>\n")
    shown = page(tmp_path, REPORT)
    for part in (
        "toy<base>",
        "<b>bold</b>",
        "75.0%",
        "accuracy of word <counts>",
        "50.0%",
        "1.00%",
        "q_proj",
        "f" * 64,
    ):
        assert part in shown.text, part
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_text_on_shades_is_readable_in_light_and_in_dark(tmp_path: Path):
    shown = page(tmp_path, REPORT).text
    light, dark = shown.split("prefers-color-scheme: dark")
    for scheme in (light, dark):
        colour = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", scheme))
        for ground in ("paper", "heat"):
            assert contrast(colour["ink"], colour[ground]) >= 4.5, (ground, colour[ground])


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours."""

    def luminance(text: str) -> float:
        channels = [int(text[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_it_opens_offline(tmp_path: Path):
    shown = page(tmp_path, REPORT)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in shown.tags}
    outside = [value for _, attributes in shown.tags for value in attributes.values() if value and "://" in value]
    assert all(re.fullmatch(r"http://www\.w3\.org/.*", value) for value in outside), outside


def test_a_bare_report_still_makes_a_page(tmp_path: Path):
    bare = {name: REPORT[name] for name in ("base", "method", "trainable_params", "total_params")}
    assert "toy<base>" in page(tmp_path, bare | {"eval_before": None, "eval_after": None}).text


def test_damaged_files_are_named(tmp_path: Path):
    with pytest.raises(ArtefactError, match="report"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    with pytest.raises(ArtefactError) as caught:
        write_report(tmp_path)
    assert "metrics.jsonl" in str(caught.value)
