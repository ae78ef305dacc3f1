"""The mixed-precision cache of past tokens."""

from model.cache.cache import Cache

__all__ = ["Cache"]
