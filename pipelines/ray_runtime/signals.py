"""SIGTERM handled like Ctrl-C: contexts are closed and the MLflow run is marked KILLED."""

import signal


def handle_sigterm(*_: object) -> None:
    """Raise KeyboardInterrupt, through the SIGINT handler if there is one."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # set by a shell for background processes
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)  # Ray Train may have installed its own handler
