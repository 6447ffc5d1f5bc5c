"""Telling another rank's end from a fault of this one."""

from __future__ import annotations

_TYPES = ("DistNetworkError", "DistBackendError")
_WORDS = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another rank has ended, or its node: nothing that was done here is then at fault.

    torch has types of its own for some of these only; gloo tells the others in words. Imports no torch.
    """
    if type(error).__name__ in _TYPES:
        return True
    failures = getattr(error, "failures", None)  # of DCP's report over all ranks
    if isinstance(failures, dict) and any(lost_peer(failure[0]) for failure in failures.values()):
        return True
    return any(words in str(error) for words in _WORDS)
