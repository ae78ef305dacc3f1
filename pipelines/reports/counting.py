"""Counts and sizes in sentences."""


def count(number: int, noun: str) -> str:
    """Return a number with its noun, whose plural takes an s."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size(number: int) -> str:
    """Return a number of bytes in the largest unit of which there is at least one."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return count(number, "byte")
