"""Number of prompt tokens to read in a step."""

from __future__ import annotations

_SMOOTHING = 0.2
"""Weight of the newest step in the running averages."""


class PrefillBudget:
    """Limits prompt tokens so that reading them takes ``share`` of the time that decoding takes, in the long run.

    Each decoding step adds credit, and reading spends it. Without completions to decode, ``chunk`` tokens are read at a
    time.
    """

    def __init__(self, chunk: int, share: float):
        self.chunk, self.share = chunk, share
        self._seconds_per_token: float | None = None
        self._credit = 0.0
        """Seconds; negative after a step that took longer than expected."""

    def tokens(self, wanted: int, decoding: bool) -> int:
        """Return how many of ``wanted`` prompt tokens to read now, possibly 0."""
        wanted = min(wanted, self.chunk)
        if not decoding or self._seconds_per_token is None:
            return wanted
        affordable = int(self._credit / self._seconds_per_token)
        # A chunk costs time of its own, so read a fair number of tokens or none.
        return min(affordable, wanted) if affordable >= min(wanted, self.chunk // 8) else 0

    def decoded(self, seconds: float) -> None:
        """Record the time of a decoding step."""
        most = self.chunk * (self._seconds_per_token or 0.0)
        self._credit = min(self._credit + self.share * seconds, max(most, self.share * seconds))

    def read(self, tokens: int, seconds: float, decoding: bool) -> None:
        """Record the time of reading ``tokens`` prompt tokens, and whether completions were waiting to be decoded."""
        self._credit = self._credit - seconds if decoding else 0.0
        per_token = seconds / tokens
        before = self._seconds_per_token
        self._seconds_per_token = per_token if before is None else before + _SMOOTHING * (per_token - before)
