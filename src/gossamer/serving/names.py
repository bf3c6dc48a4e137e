"""What a server may call what it serves. Names are compared letter by letter: `SQL` and `sql` are two."""

from __future__ import annotations

from collections.abc import Iterable

from gossamer.errors import UsageError

MOST = 256
"""Characters of a name that a request may hold."""


def check_name(name: str) -> None:
    """Raise `UsageError` for a name that no client can ask for, or that says something else where names stand."""
    reasons = {
        "it is empty": not name,
        "it is longer than a request may say": len(name) > MOST,
        "it holds control or invisible characters": not name.isprintable(),
        "it begins or ends with a space": name != name.strip(),
        "it begins with a dot, as hidden folders do": name.startswith("."),
        "a star stands for all names": name == "*",
    }
    if said := [reason for reason, there in reasons.items() if there]:
        raise UsageError("this cannot be the name of an adapter or a base", got=f"{name[:64]!r}: {said[0]}")


def check_names(base: str, adapters: Iterable[str], other: str | None = None, others: Iterable[str] = ()) -> None:
    """Hold that every name means one thing: a base's, its adapters', and those of a second base for vectors.

    Raises: UsageError, which names the clash.
    """
    bases = [base] if other is None else [base, other]
    meant: dict[str, str] = {}
    for name, what in [
        *((one, "a base") for one in bases),
        *((one, f"an adapter of {base!r}") for one in adapters),
        *((one, f"an adapter of {other!r}") for one in others),
    ]:
        check_name(name)
        prefix = next((one + ":" for one in bases if name.startswith(one + ":")), "")
        if prefix:
            got = f"{name!r}: it reads as {name.removeprefix(prefix)!r} of {prefix[:-1]!r}"
            raise UsageError("a name that means something else", got=got, hint="rename the adapter's folder")
        if name in meant:
            hint = "give the base another name (--name), or rename the adapter's folder"
            raise UsageError("one name for two models", where=name, got=f"{meant[name]} and {what}", hint=hint)
        meant[name] = what
