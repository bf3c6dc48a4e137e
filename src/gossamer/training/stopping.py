"""Early stopping: a run ends once the held-out loss has not become better for a while, with the factors of its best.

Source: Prechelt 1998, "Early Stopping - But When?", section 2.2: the criterion UP_s.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Stopping:
    """What the evaluations so far say. Without patience they are only counted.

    Attributes:
        patience: evaluations in a row that may be no better than the best one.
        evaluated: the step of the last evaluation.
        best, best_step: the lowest loss, and the step after which it was measured.
        waited: evaluations since then.
    """

    patience: int | None
    evaluated: int = 0
    best: float | None = None
    best_step: int | None = None
    waited: int = 0

    @property
    def over(self) -> bool:
        """Whether the run has come to its end."""
        return self.patience is not None and self.waited >= self.patience

    def see(self, step: int, loss: float) -> bool:
        """Take a figure in. Whether these factors are to be kept, as the best so far."""
        self.evaluated = step
        if self.patience is None:
            return False
        better = self.best is None or loss < self.best
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best, self.best_step = loss, step
        return better

    def state(self) -> dict[str, Any]:
        """For a checkpoint; `Stopping(**state)` is the same again."""
        return asdict(self)
