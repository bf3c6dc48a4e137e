"""What is trained, without torch until it is looked at: any method of the library, by its fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.methods import TargetedMethod

_TITLES = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA"}


@dataclass(frozen=True)
class Tuning:
    """A method and what was said of its fields, as JSON."""

    name: str = "lora"
    said: str = "{}"

    @classmethod
    def of(cls, method: Any) -> Tuning:
        """From a name, a mapping, a spec of `gossamer.methods`, or nothing. Raises `SpecError` for what is none."""
        if method is None or isinstance(method, Tuning):
            return method or cls()
        if isinstance(method, str | Mapping):
            given = {"name": method} if isinstance(method, str) else dict(method)
            found = cls(str(given.pop("name", "lora")), json.dumps(given, sort_keys=True))
            if not found.plain:
                found.spec()  # what is wrong with it is said now
            return found
        usual = type(method)().to_dict()
        given = {key: value for key, value in method.to_dict().items() if value != usual.get(key, method)}
        return cls(method.name, json.dumps(given, sort_keys=True))

    def spec(self) -> TargetedMethod:
        """The method itself."""
        from gossamer.methods import method_from_dict

        return method_from_dict({"name": self.name} | self.given)

    @cached_property
    def given(self) -> dict[str, Any]:
        """What was said of its fields."""
        return json.loads(self.said)

    @property
    def r(self) -> int:
        """Rank, of a method that has one."""
        return self.given.get("r", 8)

    @property
    def targets(self) -> str | list[str]:
        """What `target_modules` says."""
        return self.given.get("target_modules", "all-linear")

    @property
    def plain(self) -> bool:
        """Whether it is full fine-tuning, or LoRA of a rank at all linear modules or at query and value."""
        if self.name == "full":
            return not self.given
        usual = self.targets in ("all-linear", ["q_proj", "v_proj"]) and type(self.r) is int and self.r > 0
        return self.name == "lora" and usual and {*self.given} <= {"r", "target_modules"}

    def __str__(self) -> str:
        title = _TITLES.get(self.name, self.name)
        if self.name == "full":
            return title
        rank = f" r={self.r}" if self.name in ("lora", "dora") else ""
        return f"{title}{rank} on {self.targets if isinstance(self.targets, str) else ', '.join(self.targets)}"
