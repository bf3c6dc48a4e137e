"""Merge adapters into a base on disk in the memory of one module, whatever the size of the base.

    W' = W + sum_i w_i scaling_i B_i A_i      in float32, rounded once to the dtype it is written in

The base is opened without being read (its parameters are views of its files), and the adapters stand at it as at any
model. Then every file is written again, tensor by tensor in the order they lie in it: what an adapter changes is
computed when its turn comes, everything else is copied, and what was read is given back. A finished file is noted with
its sha256 beside it, so that whoever is interrupted goes on there.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.adapter import Adapter
from gossamer.attachment import Group, attach, attached, merge_groups, use
from gossamer.errors import DiskError, GossamerError, NonFiniteError, StateError
from gossamer.files.atomic import TEMPORARY_SUFFIX, continued_folder, new_file, require_space, sha256_file, write_json
from gossamer.files.folder import read_json
from gossamer.files.shards import INDEX, Outline, Shard, pieces_of, write_shard
from gossamer.merging.companions import TEMPLATES, Companions
from gossamer.models.device import keep_freed_memory
from gossamer.models.mapped import Mapped, Place, mapped_model
from gossamer.progress import Progress

NOTE = "gossamer-merge.json"
"""What a merged folder says of itself: base, adapters, and the sha256 of each of its files of weights."""
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""How the names of files end that are taken over beside the weights."""
SAMPLES = 64
"""Numbers of each changed parameter that are looked at again once they are on the disk."""
_JOURNAL = "gossamer-journal"
_READ_IN = 1 << 27
"""Bytes of the largest tensor that is read into memory before its turn."""


def stand(model: nn.Module, adapters: Sequence[Adapter], *, force_base: bool = False) -> set[str]:
    """Attach the adapters, all of them active; paths of the modules that carry any. Raises what `attach` raises."""
    names = [f"adapter-{number}" for number in range(len(adapters))]
    reports = [attach(model, one, name, force_base=force_base) for name, one in zip(names, adapters, strict=True)]
    use(model, *names)
    return {row.path for report in reports for row in report.sites}


def change_of(base: Mapped, adapters: Sequence[Adapter], *, force_base: bool = False) -> list[Group]:
    """Stand the adapters at a mapped base, and say what a merge of them all would change."""
    stand(base.model, adapters, force_base=force_base)
    return merge_groups(base.model, *attached(base.model), dtype=torch.promote_types(base.model.dtype, torch.float32))


def streamable(base: Mapped, groups: Sequence[Group]) -> bool:
    """Whether all that may change is stored as the model holds it. Raises `UnsupportedError` for what is no weight."""
    for group in groups:
        if not group.parameters():  # stands at no weight of its own, so no file would ever ask for it
            group.changes()
    return all(name in base.places for group in groups for name in group.parameters())


def outlined(base: Mapped, groups: Sequence[Group], dtype: torch.dtype | None) -> dict[str, int]:
    """What `merge_streamed` would write: {"modules", "files", "bytes"}."""
    work = Work(base, groups, dtype, None)
    outlines = [work.outline(shard) for shard in base.shards.values()]
    modules = sum(len(group.sites) for group in groups)
    return {"modules": modules, "files": len(outlines), "bytes": sum(outline.nbytes for outline in outlines)}


def merge_streamed(
    base: Mapped,
    groups: Sequence[Group],
    output: Path,
    note: dict[str, Any],
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    companions: Companions | None = None,
) -> dict[str, Any]:
    """Write the folder of a base with what stands at it folded in; see `merge_into_base`.

    Args:
        base, groups: of `change_of`, and `streamable`.
        note: what is merged, written into the folder; an interrupted merge is continued only by one with an equal note.
        dtype: of all floating parameters; None keeps what each is stored in.
        companions: the adapters' own tokenizer and settings, which take the place of the base's.

    Returns: {"modules", "files", "continued", "bytes", "rounding"}; see `merge_into_base`.
    """
    keep_freed_memory()
    work = Work(base, groups, dtype, progress)
    with continued_folder(output) as folder:
        journal = folder / _JOURNAL
        _same_work(journal, note, folder)
        try:
            found = {file: _finished(folder, journal, file) for file in base.shards}
            records = {file: record for file, record in found.items() if record is not None}
            continued = len(records)
            records |= work.write(folder, journal, [file for file in found if file not in records])
            copy_rest(base.folder, folder)
            _tell_dtype(folder, dtype)
            if companions:
                companions.write(folder)
            rounding = _checked(folder, records)
        except GossamerError as error:
            if not isinstance(error, DiskError):  # nothing can come of it
                shutil.rmtree(folder, ignore_errors=True)
            raise
        write_json(folder / NOTE, note | {"files": {file: record["sha256"] for file, record in records.items()}})
        shutil.rmtree(journal)
    return outlined(base, groups, dtype) | {"continued": continued, "rounding": rounding}


@dataclass
class Work:
    """What is written where: the base's files again, with what the groups change."""

    base: Mapped
    groups: Sequence[Group]
    dtype: torch.dtype | None
    progress: Progress | None
    waiting: dict[Place, Group] = field(init=False)
    """Stored tensors whose new values are not computed yet."""
    ready: dict[Place, Tensor] = field(default_factory=dict)
    """Those that are, until they are written."""

    def __post_init__(self) -> None:
        places = self.base.places
        self.waiting = {places[name]: group for group in self.groups for name in group.parameters()}

    def write(self, folder: Path, journal: Path, files: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Write these files; each is whole and noted in the journal, or not there."""
        shards = {file: self.base.shards[file] for file in files}
        outlines = {file: self.outline(shard) for file, shard in shards.items()}
        require_space(folder, sum(outline.nbytes for outline in outlines.values()))
        if self.progress:
            self.progress.start(sum(len(shard.tensors) for shard in shards.values()), "merging")
        records = {}
        reading = ThreadPoolExecutor(1)
        try:
            for file in files:
                sampled: dict[str, dict[str, list[float]]] = {}
                values = (self._pieces(Place(file, name), sampled, reading) for name in shards[file].tensors)
                with new_file(folder / file, needed=outlines[file].nbytes) as opened:
                    digest = write_shard(opened, outlines[file], values, shards[file].forget)
                records[file] = {"sha256": digest, "bytes": outlines[file].nbytes, "sampled": sampled}
                write_json(journal / f"{file}.json", records[file])
        finally:
            reading.shutdown(cancel_futures=True)
            if self.progress:
                self.progress.finish()
        return records

    def outline(self, shard: Shard) -> Outline:
        """What the file will hold that comes of this one."""
        tensors = {name: (self._dtype(tensor), tuple(tensor.shape)) for name, tensor in shard.tensors.items()}
        return Outline(tensors, shard.metadata)

    def _dtype(self, stored: Tensor) -> torch.dtype:
        return self.dtype if self.dtype and stored.is_floating_point() else stored.dtype

    @torch.no_grad()
    def _pieces(self, place: Place, sampled: dict[str, dict[str, list[float]]], reading: Executor) -> Iterator[Tensor]:
        """What becomes of a stored tensor, in flat pieces of the dtype it is written in."""
        shard, stored = self.base.shards[place.file], self.base.stored(place)
        self._look_ahead(shard, place.name, reading)
        changed, places = self._changed(place), _sampled(stored.numel())
        wanted: list[float] = []
        start = 0
        for piece in pieces_of(stored) if changed is None else changed:
            rounded = piece.to(self._dtype(stored))
            if rounded.dtype == torch.float16 and not torch.isfinite(rounded).all():
                raise NonFiniteError("float16 cannot hold this weight", where=place.name, hint="--dtype bf16")
            yield rounded
            if changed is not None:
                wanted += piece[places[(places >= start) & (places < start + len(piece))] - start].double().tolist()
            start += len(piece)
        if changed is not None:
            sampled[place.name] = {"before": _samples(stored), "wanted": wanted}
        shard.forget(stored)
        if self.progress:
            self.progress.step()

    def _changed(self, place: Place) -> Iterator[Tensor] | None:
        """The new values of a stored tensor in pieces; None where it stays as it is."""
        group = self.waiting.get(place)
        name = group.row_wise() if group else None
        if group and name:
            return (rows.reshape(-1) for rows in group.rows()) if self.base.places[name] == place else None
        if group:
            self._compute(group)
        value = self.ready.pop(place, None)
        return None if value is None else pieces_of(value)

    def _compute(self, group: Group) -> None:
        """The new values of one group, kept until their turns come."""
        for path, name, value in group.changes():
            self.ready[self.base.places[f"{path}.{name}" if path else name]] = value
        for name in group.parameters():
            self.waiting.pop(self.base.places[name], None)
        self.base.forget(*group.parameters())

    def _look_ahead(self, shard: Shard, name: str, reading: Executor) -> None:
        """Let the next few tensors be read; of those that are not very large, the next one into memory."""
        names = [*shard.tensors]
        here = names.index(name)
        following = [shard.tensors[one] for one in names[here + 1 : here + 5]]
        for one in following:
            shard.ahead(one)
        if following and following[0].nbytes <= _READ_IN:
            reading.submit(shard.read_in, following[0])


def _samples(tensor: Tensor) -> list[float]:
    """Numbers spread evenly over a tensor."""
    return tensor.reshape(-1)[_sampled(tensor.numel())].double().tolist()


def _sampled(size: int) -> Tensor:
    """Where they are."""
    count = min(SAMPLES, size)
    return torch.arange(count) * size // max(count, 1)


def _same_work(journal: Path, note: dict[str, Any], folder: Path) -> None:
    """Note down what this merge is of. Raises `StateError` where another one was interrupted."""
    known = journal / "note.json"
    if known.is_file() and read_json(known) != note:
        raise StateError(
            "another merge into this folder was interrupted", where=str(folder), hint="remove it to begin this one"
        )
    write_json(known, note)
    for cut in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        cut.unlink()


def _finished(folder: Path, journal: Path, file: str) -> dict[str, Any] | None:
    """What the journal says of a file that is there as it says."""
    record = journal / f"{file}.json"
    if not record.is_file() or not (folder / file).is_file():
        return None
    noted = read_json(record)
    same = noted.get("bytes") == (folder / file).stat().st_size and noted.get("sha256") == sha256_file(folder / file)
    return noted if same else None


def copy_rest(base: Path, folder: Path, but: Sequence[str] = ()) -> None:
    """Config, tokenizer, processor and index; nothing that could hold weights or code, and no file named in `but`."""
    for path in sorted([*base.iterdir(), *base.glob(f"{TEMPLATES[-1]}/*")]):
        ours = path.name.startswith("gossamer-") or path.name in but
        if path.is_file() and path.name.endswith(COPIED) and not ours:
            (folder / path.relative_to(base)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / path.relative_to(base))


def _tell_dtype(folder: Path, dtype: torch.dtype | None) -> None:
    """Config and index of weights that are written in another dtype than the base's."""
    for name in ("config.json", INDEX) if dtype else ():
        if not (folder / name).is_file():
            continue
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if name == INDEX:
            tensors = [tensor for shard in mapped_model(folder).shards.values() for tensor in shard.tensors.values()]
            content["metadata"] = content.get("metadata", {}) | {"total_size": sum(one.nbytes for one in tensors)}
        write_json(folder / name, _retyped(content, str(dtype).removeprefix("torch.")))


def _retyped(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config that says in which dtype its weights are, and those of its parts."""
    changed = {key: _retyped(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return changed | {key: dtype for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}


def _checked(folder: Path, records: dict[str, dict[str, Any]]) -> float:
    """Open what was written as a model, and compare its samples; returns what rounding took from the change.

    Raises `DiskError` where the files say something else than what was written.
    """
    written = mapped_model(folder)
    lost = change = 0.0
    for file, record in records.items():
        for name, samples in record["sampled"].items():
            tensor = written.shards[file].tensors[name]
            before, wanted = (torch.tensor(samples[key], dtype=torch.float64) for key in ("before", "wanted"))
            found = torch.tensor(_samples(tensor), dtype=torch.float64)
            written.shards[file].forget(tensor)
            if not torch.equal(found, wanted.to(tensor.dtype).double()):
                raise DiskError("what is read back is not what was written", where=f"{folder / file}: {name}")
            share = tensor.numel() / max(len(found), 1)
            lost += share * (found - wanted).square().sum().item()
            change += share * (wanted - before).square().sum().item()
    return (lost / change) ** 0.5 if change else 0.0
