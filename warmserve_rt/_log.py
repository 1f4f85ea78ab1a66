"""The library's log: logger "warmserve_rt", silent until its user configures logging.

INFO says what came, went and changed; DEBUG each prewarm, eviction and lease that had to wait;
WARNING what a person must know.
"""

from __future__ import annotations

import logging

log = logging.getLogger("warmserve_rt")
log.addHandler(logging.NullHandler())
