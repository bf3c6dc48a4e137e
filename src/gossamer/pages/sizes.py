"""Bytes, counts and durations as a person reads them."""

_DECIMAL = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size(nbytes: float) -> str:
    """Bytes of memory in the largest decimal unit that leaves a figure before the point: 2.50 GB, 141 GB."""
    for unit, name in _DECIMAL:
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}" if nbytes < 100 * unit else f"{nbytes / unit:.0f} {name}"
    return f"{nbytes:.0f} B"


def amount(nbytes: float) -> str:
    """Bytes of a file, in as many digits as matter there: 1460 -> "1.5 kB"."""
    for unit, name in _DECIMAL[1:]:
        if nbytes >= unit:
            return f"{nbytes / unit:.{2 if name == 'GB' else 1}f} {name}"
    return f"{nbytes:.0f} bytes"


def count(number: float) -> str:
    """A count with its unit: 18.9M, 174.6B."""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """As a person says it: hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
