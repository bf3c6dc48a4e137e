"""How fast is a classifier measured whose labels are one token each, beside padded batches of transformers' own?

The same rows and the same measure: the label with the largest probability after the prompt, and the mean loss over the
labels. A loop of one's own pads each batch, in the rows' order or sorted by length, and asks for
the last token's logits alone. Gossamer packs rows without padding and meets the head at one position a row too.
Accuracies must be equal, and losses to 1e-4, before the clock starts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

import gossamer as gs
from bench.common import Row, interleaved, report

BASE, DATA = "smollm2-135m", "reviews"
ROWS, BATCH, ROUNDS = 64, 16, 3
Line = dict[str, str]
"""A prompt and its completion, the label."""


def measure() -> list[Row]:
    """On the real model: reviews as they are, and with a text of some 140 tokens before one prompt in sixteen."""
    gs.fetch(BASE)
    gs.fetch(DATA)
    model, tokenizer = gs.load_base(BASE, dtype=torch.float32)
    lines = (gs.fetch(DATA) / "eval.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    reviews: list[Line] = [json.loads(line) for line in lines]
    history = " ".join(line["prompt"].removeprefix("Review:") for line in reviews)[:600]
    uneven = [{**line, "prompt": history + line["prompt"]} if at % BATCH == 0 else line
              for at, line in enumerate(reviews)]  # fmt: skip
    return [*compared(model, tokenizer, "reviews", reviews), *compared(model, tokenizer, "uneven", uneven)]


def compared(model: Any, tokenizer: Any, name: str, lines: Sequence[Line], rounds: int = ROUNDS) -> list[Row]:
    """All contenders on one set of rows."""
    ordered = sorted(lines, key=lambda line: -len(line["prompt"]))
    contenders = {
        "padded in order": partial(padded, model, tokenizer, lines),
        "padded, sorted by length": partial(padded, model, tokenizer, ordered),
        "Gossamer": partial(ours, model, tokenizer, lines),
    }
    results = {contender: call() for contender, call in contenders.items()}
    accuracy, loss = results["Gossamer"]
    for contender, (other, its_loss) in results.items():
        assert other == accuracy, f"{contender} finds an accuracy of {other}, not {accuracy}"
        assert abs(its_loss - loss) < 1e-4, f"{contender} finds a loss of {its_loss}, not {loss}"
    times = interleaved(contenders, rounds=rounds, warmup=0)
    fastest = times["Gossamer"].median
    return [
        {"rows": name, "contender": contender, **took.row("s"), "over Gossamer": round(took.median / fastest, 2)}
        for contender, took in times.items()
    ]


def ours(model: Any, tokenizer: Any, lines: Sequence[Line]) -> tuple[float, float]:
    """Accuracy and loss."""
    found = gs.evaluate(model, tokenizer, lines, task="classify", batch_size=BATCH)
    return found["accuracy"], found["loss"]


@torch.inference_mode()
def padded(model: Any, tokenizer: Any, lines: Sequence[Line]) -> tuple[float, float]:
    """The same by a loop over padded batches."""
    labels = sorted({line["completion"] for line in lines})
    ids = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
    assert all(len(one) == 1 for one in ids), f"labels of more than one token: {labels}"
    choices = torch.tensor([one[0] for one in ids])
    right, loss = 0, 0.0
    for start in range(0, len(lines), BATCH):
        batch = lines[start : start + BATCH]
        inputs = tokenizer([one["prompt"] for one in batch], return_tensors="pt", padding=True, padding_side="left")
        places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=places, logits_to_keep=1).logits[:, -1]
        among = logits.log_softmax(-1)[:, choices]
        truth = torch.tensor([labels.index(one["completion"]) for one in batch])
        right += int((among.argmax(-1) == truth).sum())
        loss -= float(among[torch.arange(len(batch)), truth].sum())
    return right / len(lines), loss / len(lines)


if __name__ == "__main__":
    report("evaluation", __doc__ or "", measure, f"SmolLM2-135M in float32, {ROWS} rows, batches of {BATCH}.")
