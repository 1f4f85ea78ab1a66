"""The library's log: logger "warmserve_rt", silent until its user configures logging.

INFO says what came, went and changed; DEBUG each prewarm, eviction and lease that had to wait;
WARNING what a person must know.
"""

from __future__ import annotations

import logging

log = logging.getLogger("warmserve_rt")
log.addHandler(logging.NullHandler())


def debug(text: str, thing: object) -> None:
    """Logs a text with the repr of something, and not the thing: a handler may keep what it is
    given, and with it memory."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug(text, repr(thing))
