"""Sizes and times as text."""

from model.wording import count


def format_bytes(number: float, digits: int = 2) -> str:
    """Return a number of bytes in the largest unit not above it, with ``digits`` decimals."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:,.{digits}f} {name}"
    return count(number, "byte")


def time_left(seconds: float) -> str:
    """Return a time that is left, in whole minutes."""
    return "under a minute left" if seconds < 60 else f"about {seconds / 60:.0f} min left"
