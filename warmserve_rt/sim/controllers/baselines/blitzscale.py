"""Serve while loading, in the manner of BlitzScale: a started instance prefills while its layers
arrive.

BlitzScale multicasts layers from running instances over the network or NVLink. Here they are loaded
from host memory over the device's own link, which is assumed to be as fast. That favours nodes
without a copy, and does not model a faster network.
"""

from __future__ import annotations

from .serverless import Serverless


class BlitzScale(Serverless):
    """A controller that differs from Serverless in its Policy: streaming, no engine start."""
