"""Cache entries to bytes and back: the one definition of what an entry looks like in memory."""

from kernels.cache_io.paged import PagedRows
from kernels.cache_io.reference import EntryLayout, pack, unpack, unpack_integers

__all__ = ["EntryLayout", "PagedRows", "pack", "unpack", "unpack_integers"]
