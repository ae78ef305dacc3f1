"""Sizes and times in sentences."""

from model.wording import count


def size(number: int) -> str:
    """Return a number of bytes in the largest unit of which there is at least one."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return count(number, "byte")


def time_left(seconds: float) -> str:
    """Return a time that is left, in whole minutes."""
    return "under a minute left" if seconds < 60 else f"about {seconds / 60:.0f} min left"
