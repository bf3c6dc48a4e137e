"""The tasks, one short file each; one that is registered in `TASKS` can be trained, measured and swept by its name."""

from collections.abc import Mapping
from typing import Any

from gossamer.errors import UsageError, nearest
from gossamer.training.tasks.classify import Classify
from gossamer.training.tasks.sft import SFT
from gossamer.training.tasks.task import LOSS, EvaluationPass, Figures, LabelTable, Measure, Prediction, Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (SFT, Classify)}
DEFAULT = SFT()


def task_of(named: str | Mapping[str, Any] | Task) -> Task:
    """The task that a name, or a mapping with a "name" and options, describes.

    Raises: UsageError for an unknown name, with the nearest one; SpecError for options that the task does not have.
    """
    if isinstance(named, Task):
        return named
    options = dict(named) if isinstance(named, Mapping) else {}
    name = options.pop("name", DEFAULT.name) if isinstance(named, Mapping) else named
    if name not in TASKS:
        raise UsageError(
            f"unknown task {name!r}", expected=" or ".join(map(repr, TASKS)), hint=nearest(str(name), TASKS)
        )
    return TASKS[name].from_dict(options, where=f"task {name}")


def read_figures(fields: Mapping[str, Any], task: str = "") -> Figures:
    """What `Figures.to_dict` wrote, perhaps by a version that knew other tasks: then the measures have a name alone.

    Args:
        task: of the run, where the fields do not name it.
    """
    kind = TASKS.get(fields.get("task", task)) or next(
        (one for one in TASKS.values() if all(measure.name in fields for measure in one.measures)), None
    )
    known = kind.measures if kind else [Measure(name) for name, value in fields.items() if isinstance(value, float)]
    return Figures(
        kind.name if kind else fields.get("task", task),
        fields.get("rows", 0),
        {measure: fields[measure.name] for measure in known if measure.name in fields},
        {name: value for name, value in fields.items() if type(value) is int and name != "rows"},
        LabelTable(kind.table, tuple(fields["labels"]), fields[kind.table]) if kind and kind.table in fields else None,
        tuple(Prediction(**one) for one in fields.get("predictions", ())),
    )


def measure_of(name: str) -> Measure | None:
    """The measure that a figure's name ends with, among those of all tasks."""
    every = (measure for task in TASKS.values() for measure in task.measures)
    return next((measure for measure in every if name.endswith(measure.name)), None)


__all__ = [
    "DEFAULT",
    "LOSS",
    "TASKS",
    "Classify",
    "EvaluationPass",
    "Figures",
    "Measure",
    "SFT",
    "Task",
    "measure_of",
    "read_figures",
    "task_of",
]
