"""SIGTERM, answered as Ctrl-C is: what is open is closed, and the run is kept as stopped."""

import signal


def on_sigterm(*_: object) -> None:
    """A handler for it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script's shell starts what it puts in the background
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)  # Ray Train may have a handler of its own
