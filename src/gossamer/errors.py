"""Every error Gossamer raises on purpose.

    GossamerError                     exit 1
    |-- UsageError                    exit 2   what was asked for cannot be done as asked
    |   |-- SpecError        spec-invalid          a value in a spec or a config file
    |   |-- TargetError      target-unmatched      a pattern that names no adaptable module
    |   |-- DataError        data-invalid          a data file or one of its rows
    |   |-- StateError       wrong-state           a call that does not fit what is attached or merged
    |   |-- SharedWeightError  shared-weight       one weight under two modules would change twice
    |   |-- UnsupportedError unsupported           refused by name
    |   `-- GradientError    no-gradient           a trainable parameter that step one does not reach
    |-- ArtefactError                 exit 3   a file that cannot be trusted
    |   |-- AdapterFileError adapter-file          an adapter folder: missing, truncated, incomplete
    |   |-- BaseMismatchError  base-mismatch       an adapter made for another base
    |   |-- BaseFileError    base-file             a base model's folder or file
    |   |-- CheckpointError  checkpoint            a training checkpoint
    |   `-- DownloadError    download              bytes that are not the ones the catalog names
    |-- ResourceError        resources             exit 4   memory or device
    |   `-- NonFiniteError   non-finite            a loss, gradient or merged weight is NaN or infinite
    |-- DiskError            disk                  exit 5   writing failed; what was there before still is
    `-- Interrupted          interrupted           exit 75  stopped between two steps; resumable

Each carries a stable `code` (a page in docs/errors/) and says what happened, where, what was found, what was
expected and, where it can, the nearest right answer.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class GossamerError(Exception):
    """What went wrong, in parts that a person and a program can both read.

    Args:
        what: one sentence that says what went wrong.
        where: the file (with line), row, module or field it concerns.
        got: what was found there.
        expected: what would have been right.
        hint: what to do next; often the nearest right answer.
    """

    code = "internal"
    exit_code = 1

    def __init__(self, what: str, *, where: str = "", got: str = "", expected: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.got, self.expected, self.hint = what, where, got, expected, hint

    def parts(self) -> dict[str, str]:
        """The non-empty parts in reading order, for `--json`."""
        fields = ("what", "where", "got", "expected", "hint")
        return {"code": self.code} | {name: getattr(self, name) for name in fields if getattr(self, name)}

    def __str__(self) -> str:
        details = (("where", self.where), ("got", self.got), ("expected", self.expected), ("hint", self.hint))
        return "\n".join(
            [f"{self.code}: {self.what}", *(f"  {label + ':':<10}{text}" for label, text in details if text)]
        )

    def __reduce__(self) -> tuple[Any, ...]:  # keyword-only arguments survive a trip between processes
        return (_rebuild, (type(self), self.what, self.__dict__))


def _rebuild(kind: type[GossamerError], what: str, state: dict[str, Any]) -> GossamerError:
    error = kind.__new__(kind)
    Exception.__init__(error, what)
    error.__dict__.update(state)
    return error


class UsageError(GossamerError):
    """What was asked for cannot be done as asked."""

    code = "usage"
    exit_code = 2


class SpecError(UsageError):
    """A value in a spec or a config file; all faults of one file are reported at once, in `faults`."""

    code = "spec-invalid"

    def __init__(self, what: str, *, faults: Iterable[str] = (), **parts: str) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join([what, *(f"  - {fault}" for fault in self.faults)]), **parts)


class TargetError(UsageError):
    """A target pattern that names no adaptable module of this model."""

    code = "target-unmatched"


class DataError(UsageError):
    """A data file, or one of its rows, that cannot be trained on."""

    code = "data-invalid"


class StateError(UsageError):
    """A call that does not fit what is attached, active or merged."""

    code = "wrong-state"


class SharedWeightError(UsageError):
    """One weight serves several modules, so changing it here would silently change the others too."""

    code = "shared-weight"


class UnsupportedError(UsageError):
    """A feature, format or module kind that this version refuses by name."""

    code = "unsupported"


class GradientError(UsageError):
    """A trainable parameter that received no gradient on the first step."""

    code = "no-gradient"


class ArtefactError(GossamerError):
    """A file on disk that cannot be trusted."""

    code = "artefact"
    exit_code = 3


class AdapterFileError(ArtefactError):
    """An adapter folder that is missing, truncated, incomplete or altered."""

    code = "adapter-file"


class BaseMismatchError(ArtefactError):
    """An adapter that was made for another base model."""

    code = "base-mismatch"


class BaseFileError(ArtefactError):
    """A base model that cannot be found or loaded."""

    code = "base-file"


class CheckpointError(ArtefactError):
    """A training checkpoint that is damaged or belongs to another run."""

    code = "checkpoint"


class DownloadError(ArtefactError):
    """A download that failed or is not the file that the catalog names."""

    code = "download"


class ResourceError(GossamerError):
    """Memory or a device that is not there."""

    code = "resources"
    exit_code = 4


class NonFiniteError(ResourceError):
    """A loss, a gradient or a merged weight is NaN or infinite; nothing was updated with it."""

    code = "non-finite"


class DiskError(GossamerError):
    """Writing failed; what was on disk before is still there."""

    code = "disk"
    exit_code = 5


class Interrupted(GossamerError):
    """Stopped between two steps after a checkpoint was written; `--resume` continues."""

    code = "interrupted"
    exit_code = 75


def nearest(name: str, candidates: Iterable[str], count: int = 3, cutoff: float = 0.5) -> str:
    """A "did you mean" hint: the candidates closest in spelling to `name`, or an empty string."""
    found = difflib.get_close_matches(name, sorted(set(candidates)), n=count, cutoff=cutoff)
    return f"did you mean {' or '.join(repr(one) for one in found)}?" if found else ""
