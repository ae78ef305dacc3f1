"""Engines that take long for a completion on any machine."""

import time

from serve.engine import Engine


def slow_down(engine: Engine, seconds: float = 0.002) -> None:
    """Make every step of an engine take at least ``seconds``."""
    step = engine._scheduler.step
    engine._scheduler.step = lambda arrivals: (time.sleep(seconds), step(arrivals))[1]
