"""The main job, end to end: a real 135M-parameter model learns to grade product reviews through LoRA.

Measures SmolLM2-135M-Instruct on sentences that people scored, trains under 2% of its parameters for a few minutes on a
CPU, measures again on reviews it never saw, merges, and compares latencies. `make demo` fetches both and runs this; the
run folder is runs/demo (report.html, adapter/, merged/).
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import gossamer as gs
from gossamer.files.atomic import write_json
from gossamer.models import data_file
from gossamer.training.runs.outcome import spectra
from gossamer.training.runs.report import write_report

CONFIG = Path(__file__).with_name("reviews.yaml")
ROUNDS, WARMUP = 30, 5
TOKENS = torch.arange(1000, 1064)[None]


def main() -> None:
    """Baseline, train, merge, time, show."""
    start = time.perf_counter()
    config = gs.RunConfig.read(CONFIG)
    output = Path(config.output)
    shutil.rmtree(output, ignore_errors=True)  # the demo owns this folder and starts afresh each time

    heading("what words alone can do: TF-IDF and logistic regression on the same split")
    baseline = tfidf_accuracy(config.data)
    print(f"accuracy {baseline:.3f}")

    heading("train: zero-shot first, then LoRA, then the same rows again")
    base = str(config.base)
    model, tokenizer = gs.load_base(base, dtype=config.dtype, device=config.device)
    print(gs.attach(model, config.method), flush=True)
    run = gs.train(model, tokenizer, config)

    heading("merge into the weights; latency of base, adapter beside it, adapter merged")
    # in float32 the merged outputs are the adapter's own; bfloat16, as the base is stored, would round the change
    merged = gs.merge_into_base(output / "adapter", base, output / "merged", dtype="float32")
    require_same(config, output)
    plain, _ = gs.load_base(base, dtype=model.dtype, device=config.device)
    folded, _ = gs.load_base(output / "merged", dtype=model.dtype, device=config.device)
    latency, ratio = latencies({"base": plain, "unmerged": model, "merged": folded})

    report = run.report | {
        "baseline": {"name": "TF-IDF + logistic regression", "accuracy": baseline},
        "latency": latency,
        "merge": {name: merged[name] for name in ("modules", "max_error", "max_logit")} | {"latency_ratio": ratio},
        "seconds_demo": time.perf_counter() - start,
    }
    write_json(output / "report.json", report)
    write_report(output, spectra=spectra(run.adapter))
    show(report, output)


def heading(text: str) -> None:
    """A line that stands out in a log."""
    print(f"\n== {text}", flush=True)


def tfidf_accuracy(data: Any) -> float:
    """Accuracy of the classical baseline on the held-out documents: TF-IDF of words and pairs, logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    seen, unseen = rows(data.train), rows(data.eval)
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=2000)
    )
    model.fit([row["prompt"] for row in seen], [row["completion"] for row in seen])
    return float(model.score([row["prompt"] for row in unseen], [row["completion"] for row in unseen]))


def rows(path: str) -> list[dict[str, str]]:
    """The rows of a data file."""
    return [json.loads(line) for line in data_file(path).read_text(encoding="utf-8").splitlines()]


@torch.inference_mode()
def require_same(config: gs.RunConfig, output: Path) -> None:
    """The merged files say what base and adapter say; in float32, as the run itself may have been in 16 bits."""
    beside, _ = gs.load_base(str(config.base), dtype="float32")
    gs.attach(beside, gs.Adapter.load(output / "adapter"))
    folded, _ = gs.load_base(output / "merged", dtype="float32")
    torch.testing.assert_close(folded(TOKENS).logits, beside(TOKENS).logits, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def latencies(models: dict[str, Any]) -> tuple[dict[str, float], float]:
    """Milliseconds of one forward over 64 tokens, medians of interleaved rounds; and merged / base, pair by pair."""
    tokens = TOKENS.to(models["base"].device)
    seen: dict[str, list[float]] = {name: [] for name in models}
    order = random.Random(0)
    for _ in range(WARMUP + ROUNDS):
        for name in order.sample([*models], len(models)):
            start = time.perf_counter()
            models[name](tokens)
            seen[name].append((time.perf_counter() - start) * 1e3)
    seen = {name: times[WARMUP:] for name, times in seen.items()}
    ratio = statistics.median(merged / base for merged, base in zip(seen["merged"], seen["base"], strict=True))
    return {name: statistics.median(times) for name, times in seen.items()}, ratio


def show(report: dict[str, Any], output: Path) -> None:
    """Three sentences, then the demo in one table."""
    heading("three held-out sentences")
    for one in report["examples"][:3]:
        print(f"  {one['prompt'].splitlines()[0].removeprefix('Review: ')}")
        print(f"      people:{one['expected']}   before:{one['before']}   after:{one['after']}")
    trainable, total, latency = report["trainable_params"], report["total_params"], report["latency"]
    heading("the demo in one table")
    for label, value in (
        ("accuracy, zero-shot", f"{report['eval_before']['accuracy']:.3f}"),
        (f"accuracy, {report['baseline']['name']}", f"{report['baseline']['accuracy']:.3f}"),
        ("accuracy, after LoRA", f"{report['eval_after']['accuracy']:.3f}"),
        ("trainable parameters", f"{trainable:,} of {total:,} ({trainable / total:.2%})"),
        ("adapter file", f"{report['adapter_bytes'] / 1e6:.1f} MB"),
        ("peak memory", f"{report['peak_memory_bytes'] / 2**30:.2f} GiB ({report['peak_memory_kind']})"),
        ("training", f"{report['training_seconds']:.0f} s, {report['tokens_per_second']:.0f} tokens/s"),
        *((f"latency of 64 tokens, {name}", f"{latency[name]:.1f} ms") for name in ("base", "unmerged", "merged")),
        ("merged / base, median of pairs", f"{report['merge']['latency_ratio']:.3f}"),
        ("all of it", f"{report['seconds_demo']:.0f} s"),
        ("report", str(output / "report.html")),
    ):
        print(f"  {label:<40} {value}")


if __name__ == "__main__":
    main()
