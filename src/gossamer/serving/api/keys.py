"""Keys, the tenants they belong to, and what each may have."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from gossamer.errors import SpecError
from gossamer.serving.api.faults import Refusal
from gossamer.spec import Names, Spec, StrictBool, StrictStr

Quota = Annotated[int, Field(strict=True, ge=1, le=10**12)]


class Key(Spec):
    """An entry of the key file. Without limits, the tenant has none."""

    key: Annotated[StrictStr, Field(min_length=16, max_length=512)] | None = None
    """What the client sends; better left out, and `key_sha256` given."""
    key_sha256: Annotated[StrictStr, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """SHA-256 of it, in hexadecimal digits."""
    tenant: Annotated[StrictStr, Field(min_length=1, max_length=128)]
    """Whose it is. Keys of one tenant share its limits."""
    adapters: Names = ()
    """Names that it may use; "*" stands for all."""
    admin: StrictBool = False
    """Whether it may load and unload adapters and read the metrics."""
    requests_per_minute: Quota | None = None
    tokens_per_minute: Quota | None = None
    concurrent: Quota | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Key:
        if (self.key is None) == (self.key_sha256 is None):
            raise ValueError("give either key or key_sha256")
        return self


class Bucket:
    """So much a minute, and no more than a minute's worth at once; None for no limit. The clock only goes forward."""

    def __init__(self, most: int | None, clock: Callable[[], float]) -> None:
        self.most, self.clock = most, clock
        self.left, self.looked = float(most or 0), clock()

    def wait(self, amount: float) -> float:
        """Seconds until so much is there: 0 for now, infinite for never."""
        if self.most is None:
            return 0.0
        now = self.clock()
        self.left = min(self.most, self.left + (now - self.looked) * self.most / 60)
        self.looked = now
        if amount > self.most:
            return math.inf
        return max(amount - self.left, 0.0) * 60 / self.most

    def take(self, amount: float) -> None:
        """Use it up; a negative amount was not needed after all."""
        if self.most is not None:
            self.left = min(self.most, self.left - amount)


class Allowance:
    """What one tenant may use up, by whichever of its keys; `now` is how many requests it has at the moment."""

    def __init__(self, key: Key, clock: Callable[[], float]) -> None:
        self.limits = (key.requests_per_minute, key.tokens_per_minute, key.concurrent)
        self.requests, self.tokens = Bucket(key.requests_per_minute, clock), Bucket(key.tokens_per_minute, clock)
        self.concurrent, self.now = key.concurrent, 0

    def enter(self, tokens: int) -> Visit:
        """Begin a request of at most so many tokens. Raises `Refusal` if a limit forbids it."""
        if self.concurrent is not None and self.now >= self.concurrent:
            raise Refusal(429, f"At most {self.concurrent} requests at a time.", "concurrency_exceeded", after=1)
        for bucket, amount, what in ((self.requests, 1, "requests"), (self.tokens, tokens, "tokens")):
            seconds = bucket.wait(amount)
            if seconds == math.inf:
                message = f"This asks for up to {tokens:,} tokens; {bucket.most:,} a minute are allowed."
                raise Refusal(400, message, "quota_too_small", param="max_tokens")
            if seconds > 0:
                message = f"At most {bucket.most:,} {what} a minute."
                raise Refusal(429, message, f"{what}_exceeded", after=math.ceil(seconds))
        self.requests.take(1)
        self.tokens.take(tokens)
        self.now += 1
        return Visit(self, tokens)


@dataclass(eq=False)
class Visit:
    """A request that counts against an allowance until it is over."""

    allowance: Allowance
    tokens: int
    over: bool = False

    def leave(self, used: int = 0) -> None:
        """It is over; of its tokens, those that it did not use are given back. Once."""
        if not self.over:
            self.over = True
            self.allowance.now -= 1
            self.allowance.tokens.take(used - self.tokens)


@dataclass(frozen=True, eq=False)
class Tenant:
    """Who sends a request, by its key."""

    name: str
    adapters: frozenset[str]
    admin: bool
    allowance: Allowance

    def may(self, adapter: str) -> bool:
        """Whether it may use an adapter."""
        return "*" in self.adapters or adapter in self.adapters


class Keyring:
    """All keys, and who has them. Without keys, every client that can reach the server is its owner."""

    def __init__(self, keys: Sequence[Key] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self.open = not keys
        self.entries: list[tuple[bytes, Tenant]] = []
        allowances: dict[str, Allowance] = {}
        for one in keys:
            mine = Allowance(one, clock)
            allowance = allowances.setdefault(one.tenant, mine)
            if allowance.limits != mine.limits:
                raise SpecError("keys of one tenant have one and the same limits", got=f"tenant {one.tenant!r}")
            digest = bytes.fromhex(one.key_sha256) if one.key_sha256 else _sha256(one.key or "")
            self.entries.append((digest, Tenant(one.tenant, frozenset(one.adapters), one.admin, allowance)))
        if len({digest for digest, _ in self.entries}) < len(self.entries):
            raise SpecError("a key stands twice in the key file")
        nobody = Allowance(Key(key="-" * 16, tenant="local"), clock)
        self.owner = Tenant("local", frozenset("*"), True, nobody)

    @classmethod
    def read(cls, path: str | Path) -> Keyring:
        """From a JSON file: a list of entries. Raises `SpecError`."""
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise SpecError("the key file cannot be read", where=str(path), got=type(error).__name__) from None
        if not isinstance(entries, list) or not entries or not all(isinstance(one, dict) for one in entries):
            raise SpecError("a key file is a list of entries", where=str(path), expected="at least one mapping")
        keys = []
        for number, one in enumerate(entries):
            try:
                keys.append(Key.from_dict(one, where=f"entry {number} of {path}"))
            except SpecError as error:  # the faults quote what was given: not the key
                faults = [fault.partition("; got ")[0] for fault in error.faults]
                raise SpecError(error.what.partition("\n")[0], faults=faults) from None
        return cls(keys)

    def whose(self, header: str) -> Tenant | None:
        """The tenant of an Authorization header. Every key is compared in full, whichever it is."""
        if self.open:
            return self.owner
        scheme, _, given = header.partition(" ")
        digest, found = _sha256(given.strip()), None
        for known, tenant in self.entries:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found if scheme.lower() == "bearer" else None


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
