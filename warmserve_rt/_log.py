"""The library's log: logger "warmserve_rt", silent until the application configures logging.

INFO: models and runtimes that are added, removed or changed. DEBUG: every prewarm and eviction, and
every lease that had to wait. WARNING: events that a person must know.
"""

from __future__ import annotations

import logging

log = logging.getLogger("warmserve_rt")
log.addHandler(logging.NullHandler())


def debug(text: str, thing: object) -> None:
    """Log a text with the repr of ``thing`` rather than ``thing`` itself: a handler may keep its
    arguments, and with them memory."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug(text, repr(thing))
