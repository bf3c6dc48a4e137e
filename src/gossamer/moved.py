"""Modules that moved: their earlier names still import, as the very same module, with a warning that names the new one.

Python asks this finder last, so it costs nothing until an import would fail.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

MOVED = {
    "data.proof": "data.masks",
    "data.sources": "data.formats",
    "drawing": "pages.charts",
    "files.foreign.changes": "files.foreign.factors",
    "merging.combining.changes": "merging.combining.pairs",
    "models.blocks": "running.blocks",
    "models.cached": "running.cached",
    "models.catalog": "catalog.catalog",
    "models.download": "catalog.download",
    "models.graphs": "running.graphs",
    "models.packed": "running.packed",
    "models.row_cache": "running.row_cache",
    "models.steps": "running.steps",
    "models.toy_inputs": "testing.toy_inputs",
    "models.toys": "testing.toys",
    "models.whole_steps": "running.whole_steps",
    "planning.known": "planning.shape",
    "planning.live": "planning.fake",
    "planning.losses": "planning.step",
    "planning.memory": "planning.plan",
    "planning.method": "planning.setting",
    "planning.page": "planning.table",
    "serving.api.fetching": "serving.api.backends",
    "serving.api.vectors": "serving.api.backends",
    "serving.guidance": "serving.grammar",
    "serving.names": "serving.folder",
    "serving.pooling": "serving.embedding",
    "serving.request": "serving.sequence",
    "serving.spelling": "serving.detokenizer",
    "serving.text": "serving.detokenizer",
    "serving.ticket": "serving.sequence",
    "training.batches": "data.batches",
    "training.causal": "training.audit",
    "training.checkpoint": "training.runs.checkpoint",
    "training.clock": "data.clock",
    "training.columns": "data.columns",
    "training.containers": "data.containers",
    "training.conversations": "data.conversations",
    "training.distributed": "training.spread.world",
    "training.fast": "running.fast",
    "training.formats": "data.formats",
    "training.identity": "training.runs.checkpoint",
    "training.interrupt": "training.stopping",
    "training.masks": "data.masks",
    "training.material": "training.dataset",
    "training.outcome": "training.runs.outcome",
    "training.pieces": "data.chat_template",
    "training.proof": "data.masks",
    "training.report": "training.runs.report",
    "training.run_folder": "training.runs.outcome",
    "training.runs.folder": "training.runs.outcome",
    "training.runs.tokenizer": "training.runs.outcome",
    "training.sharding": "training.spread.sharding",
    "training.sweep": "training.many.sweep",
    "training.trainee": "training.state",
}
"""Earlier name -> name, both without `gossamer.`."""

RENAMED: dict[str, dict[str, str]] = {
    "files.foreign.changes": {"Change": "Factors", "changes_of": "factors_of"},
    "merging.combining.changes": {"Changes": "AdapterPairs"},
    "planning.memory": {"MemoryBreakdown": "Plan"},
    "serving": {"Request": "Sequence"},
    "serving.guidance": {"Guide": "Grammar"},
    "serving.names": {"MOST": "LONGEST_NAME"},
    "serving.request": {"Request": "Sequence"},
    "serving.text": {"Writer": "Detokenizer"},
    "serving.ticket": {"Ticket": "Sequence"},
    "training.containers": {"Faults": "RowFaults"},
    "training.formats": {"Row": "row_of"},
    "training.material": {"Material": "EncodedDataset"},
    "training.pieces": {"Piece": "MaskedText", "Writer": "ChatRenderer"},
    "training.sweep": {"Plan": "SweepPlan", "Setting": "Variant"},
    "training.trainee": {"Trainee": "TrainState"},
}
"""Earlier name of a module -> earlier name in it -> name. `renamed` answers for a module that has not moved."""


class Moved:
    """Finds a moved module by its earlier name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module that moved; None for every other, which is then not found."""
        return ModuleSpec(fullname, cast(Any, self)) if fullname.removeprefix("gossamer.") in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """As Python makes one; `exec_module` puts the real one in its place."""

    def exec_module(self, module: ModuleType) -> None:
        """Import the module by its present name, and let the earlier name mean it."""
        earlier = module.__name__.removeprefix("gossamer.")
        now = f"gossamer.{MOVED[earlier]}"
        warnings.warn(f"{module.__name__} is {now} now", DeprecationWarning, stacklevel=2)
        real = importlib.import_module(now)
        for old, new in RENAMED.get(earlier, {}).items():
            setattr(real, old, getattr(real, new))
        sys.modules[module.__name__] = real


def renamed(package: str) -> Callable[[str], object]:
    """The `__getattr__` (PEP 562) of a module that stayed: earlier names in it, each with a warning."""

    def get(name: str) -> object:
        now = RENAMED[package.removeprefix("gossamer.")].get(name)
        if now is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        warnings.warn(f"{package}.{name} is {package}.{now} now", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[package], now)

    return get


def install() -> None:
    """Answer for the earlier names from now on."""
    sys.meta_path.append(Moved())
