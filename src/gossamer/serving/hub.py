"""Adapters by their id on the Hugging Face hub, for those ids that whoever runs the server allows.

An id is asked for once: the commit that it means then is what it means until it is unloaded. Nothing but the adapter's
JSON and safetensors, its own tokenizer and chat template is fetched, into the hub's own cache on this machine.
"""

import re
from collections.abc import Sequence
from functools import partial

from gossamer.errors import UsageError
from gossamer.files.companions import CHAT, is_companion
from gossamer.files.hub import Fetched, fetch, is_id

_PATTERN = re.compile(r"[\w.*-]{1,96}/[\w.*-]{1,96}", re.ASCII)


class Hub:
    """Fetches what it may.

    Args:
        patterns: of ids, as "owner/*"; a star stands for any part of an owner or a name. Without any, nothing is
            allowed.
        most: bytes of one adapter's files.
        seconds: for each answer of the hub.

    Raises: UsageError for a pattern that is none.
    """

    def __init__(self, patterns: Sequence[str] = (), *, most: int = 2**30, seconds: float = 10.0) -> None:
        for one in patterns:
            if not _PATTERN.fullmatch(one):
                raise UsageError(
                    "not a pattern of ids on the hub", where="--hub", got=one, expected="owner/name or owner/*"
                )
        self.patterns = [re.compile(re.escape(one).replace(r"\*", r"[\w.-]*"), re.ASCII) for one in patterns]
        self.most, self.seconds = most, seconds

    def allows(self, name: str) -> bool:
        """Whether this is an id that may be fetched; needs no network."""
        return is_id(name) and any(one.fullmatch(name) for one in self.patterns)

    def fetch(self, name: str) -> Fetched | None:
        """Resolve an id and fetch its files, at that commit; None where the hub says that it has no such id.

        Raises: UsageError for an id that is not allowed; as `gossamer.files.hub.fetch`.
        """
        if not self.allows(name):
            raise UsageError("this id may not be fetched", got=name)
        return fetch(name, beside=partial(is_companion, names=CHAT), most=self.most, seconds=self.seconds)
