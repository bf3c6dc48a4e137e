"""What an attach did, for people and for programs."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from gossamer.pages.sizes import amount


@dataclass(frozen=True)
class SiteRow:
    """One module that carries the adapter.

    Attributes:
        path: canonical path; `kind`: its class; `shape`: (out, in) of its weight, or its parameter shapes' text.
        rank: of the low-rank update; None where parameters are trained whole.
        parameters: how many numbers the adapter holds for it.
    """

    path: str
    kind: str
    shape: str
    rank: int | None
    parameters: int


@dataclass(frozen=True)
class InjectionReport:
    """The modules an adapter stands at, and what it costs. `print(report)` shows a table.

    Attributes:
        name: the adapter's name on this model.
        sites: one row a module.
        trainable: parameters that receive gradients; `total`: the base's parameters and the adapter's.
        nbytes: bytes of the adapter's tensors.
        notes: what a reader should know (shared modules, for example).
    """

    name: str
    sites: tuple[SiteRow, ...]
    trainable: int
    total: int
    nbytes: int
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """trainable / total."""
        return self.trainable / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"share": self.share}

    def __str__(self) -> str:
        groups: Counter[tuple[str, str, str, int | None]] = Counter()
        sizes: Counter[tuple[str, str, str, int | None]] = Counter()
        for row in self.sites:
            key = (row.path.rsplit(".", 1)[-1], row.kind, row.shape, row.rank)
            groups[key] += 1
            sizes[key] += row.parameters
        rows = [("module", "class", "count", "weight", "rank", "parameters")]
        rows += [
            (name, kind, f"x {groups[key]}", shape, "whole" if rank is None else str(rank), f"{sizes[key]:,}")
            for key in groups
            for name, kind, shape, rank in [key]
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = f"{self.trainable:,} trainable of {self.total:,} ({self.share:.2%}), {amount(self.nbytes)}"
        return "\n".join([f"adapter {self.name!r}: {len(self.sites)} modules", *lines, total, *self.notes])
