"""Many runs out of one config file: the settings of a sweep, or the data sets of a fleet, trained on one base.

sweep   keys with lists of values  -> one setting for each combination, all on the config's data
fleet   a folder of data sets      -> one adapter for each, named as the data set is
"""

import itertools
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer import __version__
from gossamer.attachment import attach
from gossamer.data.containers import SUFFIXES
from gossamer.errors import DataError, GossamerError, SpecError, nearest
from gossamer.files.atomic import write_json, write_text
from gossamer.models import load_base
from gossamer.progress import Progress
from gossamer.spec import read_yaml, write_yaml
from gossamer.training.config import Draft, RunConfig
from gossamer.training.dataset import Steps
from gossamer.training.many.many import EncodedDatasets, Runs, train_many
from gossamer.training.many.report import train_loss, write_sweep_report
from gossamer.training.runs.outcome import open_run
from gossamer.training.spread.world import World
from gossamer.training.tasks import read_figures

ROOTS = ("method", "train")
"""What may vary in a sweep; base and data are what its settings share."""
MOST = 1000
"""Settings of a sweep."""


@dataclass(frozen=True)
class Variant:
    """One run of several: its name, what is its own (dotted key -> value), and its whole config."""

    name: str
    own: Mapping[str, Any]
    config: RunConfig


@dataclass(frozen=True)
class SweepPlan:
    """Runs that share a base. `kind` is "sweep" or "fleet"; `shared` is what the config file says."""

    kind: str
    output: str
    shared: Mapping[str, Any]
    settings: tuple[Variant, ...]
    notes: tuple[str, ...] = ()


def read_sweep(config: str | Path, sweep: str | Path, overrides: Sequence[str] = ()) -> SweepPlan:
    """The grid of a YAML file such as `{method.r: [4, 8], train.lr: [1e-4, 5e-4]}` over a config file.

    Raises: SpecError with all faults at once, each with its place in either file.
    """
    draft, faults = Draft.read(config, overrides), []
    axes, lines = read_yaml(sweep)
    for key, values in axes.items():
        root, _, rest = key.partition(".")
        place = lines.at((key,))
        if root not in ROOTS or not rest:
            hint = nearest(root, ROOTS) or f"what may vary is {' and '.join(f'{one}.*' for one in ROOTS)}"
            faults.append(f"{place}: {key}: not a key that a sweep can vary; {hint}")
        elif not isinstance(values, list) or not values:
            faults.append(f"{place}: {key}: must be a list of the values to try; got {values!r}")
    count = math.prod(len(values) if isinstance(values, list) else 1 for values in axes.values())
    if not axes or count > MOST:
        faults.append(f"{sweep}: {count if axes else 'no'} settings; expected 1 to {MOST:,}")
    if faults:
        raise SpecError(f"{sweep} is not a sweep", faults=faults)
    owns = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    named = dict(zip(_distinct([_name_of(own) for own in owns]), owns, strict=True))
    return _plan("sweep", draft, named, {key: lines.at((key,)) for key in axes})


def read_fleet(config: str | Path, folder: str | Path, overrides: Sequence[str] = ()) -> SweepPlan:
    """One adapter for each data set of a folder: a data file, or a folder with `train.*` and perhaps `eval.*`.

    The config's own `data.train` is not read; its `data.eval` measures the data sets that have no rows for that.

    Raises: DataError for a folder without data sets, or two of one name; SpecError as `RunConfig.read` does.
    """
    draft, found, notes = Draft.read(config, overrides), {}, []
    if isinstance(data := draft.fields.get("data", {}), str):
        draft = draft.put(("data",), {"train": data}, draft.lines.at(("data",)))
    if not Path(folder).is_dir():
        raise DataError("a fleet is a folder of data sets", where=str(folder), got="no such folder")
    for entry in sorted(one for one in Path(folder).iterdir() if not one.name.startswith(".")):
        files = _data_set(entry)
        if not files:
            notes.append(f"passing over {entry}: neither a data file nor a folder with train.*")
            continue
        name = _usable(entry.name if entry.is_dir() else entry.stem)
        if name in found:
            raise DataError("two data sets of one name", where=str(entry), got=str(found[name]["train"]))
        found[name] = files
    if not found:
        expected = f"files that end in {', '.join(SUFFIXES)}"
        raise DataError("no data set in this folder", where=str(folder), expected=expected)
    named = {name: {f"data.{part}": str(file) for part, file in files.items()} for name, files in found.items()}
    return _plan("fleet", draft, named, {}, tuple(notes))


def _data_set(entry: Path) -> dict[str, Path]:
    """{"train": file} with "eval" where there is one; nothing for what is no data set."""
    if not entry.is_dir():
        return {"train": entry} if entry.suffix.lower() in SUFFIXES else {}
    files = {one.stem: one for one in sorted(entry.iterdir()) if one.suffix.lower() in SUFFIXES}
    return {part: files[part] for part in ("train", "eval") if part in files} if "train" in files else {}


def _plan(
    kind: str,
    draft: Draft,
    named: Mapping[str, Mapping[str, Any]],
    places: Mapping[str, str],
    notes: tuple[str, ...] = (),
) -> SweepPlan:
    """Validate every variant, and give each its folder below the config's; `places` say where a key's values are."""
    settings, faults = [], []
    for name, own in named.items():
        variant = draft
        for key, value in own.items():
            variant = variant.put(tuple(key.split(".")), value, places.get(key, value))
        if "output" in draft.fields:
            output = str(Path(str(draft.fields["output"])) / name)
            variant = variant.put(("output",), output, draft.lines.at(("output",)))
        try:
            settings.append(Variant(name, own, variant.config()))
        except SpecError as error:
            faults += error.faults
    if faults:
        raise SpecError(f"the {kind} is not valid", faults=dict.fromkeys(faults))
    return SweepPlan(kind, str(draft.fields["output"]), draft.fields, tuple(settings), notes)


def run_plan(plan: SweepPlan, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Train every setting on one base, and write sweep.json and sweep.html (or fleet.*) beside the run folders.

    Returns:
        What is in the JSON file: {"kind", "base", "metric", "best", "seconds", "runs": [{"name", "settings", "output",
        "trainable_params", "train_loss", "eval_before", "eval_after", "seconds"} or {..., "error"}]}. "metric" is what
        "best" is chosen by: the first measure of the task, or None without held-out rows or for a fleet.

    Raises: what `train_many` raises; StateError for an output folder in use; DataError, before the base is loaded,
    where no setting has files that can be read. Settings that fail are in the result.
    """
    world = World.here(plan.settings[0].config.device)
    show, start = world.shown(progress), time.monotonic()
    resume = resume or (world.restarts > 0 and world.first(lambda: Path(plan.output).exists()))
    _refuse_without_rows(plan)
    with world.opened(lambda: open_run(plan.output, resume=resume)) as folder:
        world.first(lambda: write_text(folder.config, write_yaml(plan.shared)))
        for note in plan.notes:
            show.say(note)
        model, tokenizer = _base(plan, world)
        begun = resume and world.first(lambda: any(Path(one.config.output).is_dir() for one in plan.settings))
        jobs = {one.name: one.config for one in plan.settings}
        runs = train_many(model, tokenizer, jobs, resume=begun, progress=show, world=world)
        result = world.first(lambda: _written(plan, folder.path, runs, time.monotonic() - start))
    world.close()
    return result


def rehearse_plan(plan: SweepPlan, progress: Progress) -> list[dict[str, Any]]:
    """The settings with the size of each adapter and its steps, or its error; nothing is trained or written."""
    _refuse_without_rows(plan)
    model, tokenizer = _base(plan, World())
    for one in plan.settings:
        one.config.task.fits(model)
    datasets, rows = EncodedDatasets(model, tokenizer), []
    for note in plan.notes:
        progress.say(note)
    for one in plan.settings:
        row: dict[str, Any] = {"name": one.name, "settings": dict(one.own)}
        try:
            steps = Steps(datasets.read(one.config, progress).examples, one.config)
            report = attach(model, one.config.method, one.name, seed=one.config.train.seed)
            rows.append(row | {"trainable_params": report.trainable, "steps": steps.total})
        except GossamerError as error:
            rows.append(row | {"error": error.parts()})
    return rows


def exit_code(plan_runs: Mapping[str, Any]) -> int:
    """0 when every run of a result is there, otherwise that of the first error."""
    kinds = {kind.code: kind.exit_code for kind in _kinds(GossamerError)}
    errors = [run["error"]["code"] for run in plan_runs["runs"] if "error" in run]
    return kinds[errors[0]] if errors else 0


def _kinds(kind: type[GossamerError]) -> list[type[GossamerError]]:
    return [kind, *(one for below in kind.__subclasses__() for one in _kinds(below))]


def _refuse_without_rows(plan: SweepPlan) -> None:
    """Raise the first `DataError` where there is none of the settings whose files can be read."""
    faults, every = [], [one.config.data for one in plan.settings]
    for data in {(one.train, one.eval, one.format): one for one in every}.values():
        try:
            data.read()
        except DataError as error:
            faults.append(error)
        else:
            return
    raise faults[0]


def _base(plan: SweepPlan, world: World) -> tuple[Any, Any]:
    first = plan.settings[0].config
    device = first.device if world.size == 1 else str(world.device)
    return load_base(first.named_base(), dtype=first.dtype, device=device, quant=first.quant)


def _written(plan: SweepPlan, folder: Path, runs: Runs, seconds: float) -> dict[str, Any]:
    rows = []
    for one in plan.settings:
        row: dict[str, Any] = {"name": one.name, "settings": dict(one.own), "output": one.config.output}
        if one.name in runs.failed:
            rows.append(row | {"error": runs.failed[one.name].parts()})
            continue
        report = runs[one.name].report
        fields = ("trainable_params", "eval_before", "eval_after", "seconds", "tokens_per_second", "adapter_digest")
        rows.append(row | {"train_loss": train_loss(runs[one.name].output)} | {name: report[name] for name in fields})
    base = {"kind": plan.kind, "base": plan.settings[0].config.base, "metric": None, "best": None}
    measured = [row["eval_after"] for row in rows if row.get("eval_after")]
    if plan.kind == "sweep" and measured:
        base["metric"] = read_figures(measured[0]).headline.name
        base["best"] = best(rows)
    result = base | {"runs": rows, "seconds": seconds, "gossamer": __version__}
    write_json(folder / f"{plan.kind}.json", result)
    write_sweep_report(folder, result)
    return result


def best(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The name of the run that did best by the first measure of its task, and by the loss among equals."""
    costs = {row["name"]: read_figures(row["eval_after"]).cost for row in rows if row.get("eval_after")}
    return min(costs, key=costs.__getitem__, default=None)


def _name_of(own: Mapping[str, Any]) -> str:
    """{"method.r": 4, "train.lr": 1e-4} -> "r4-lr1e-4"."""
    parts = []
    for key, value in own.items():
        text = _slug(value)
        parts.append(f"{key.rpartition('.')[2]}{'' if text[:1].isdigit() else '_'}{text}")
    return _usable("-".join(parts))


def _slug(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "_".join(map(_slug, value)) or "none"
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        digits, _, power = f"{value:e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _usable(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:60] or "_"


def _distinct(names: Sequence[str]) -> list[str]:
    """The names; one that is there already gets a number."""
    result: list[str] = []
    for name in names:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        result.append(next(one for one in itertools.chain([name], numbered) if one not in result))
    return result
