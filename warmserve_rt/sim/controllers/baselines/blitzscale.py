"""Serving while loading, in the manner of BlitzScale: a started instance prefills behind the layers
that come in.

BlitzScale multicasts them from instances that run, over the network or NVLink. Here they come from
host memory over the device's own link, taken to be as fast: that helps nodes without a copy and
does not model a faster network.
"""

from __future__ import annotations

from .serverless import Autoscaling


class BlitzScale(Autoscaling):
    """What sets it apart is its Policy: streaming, no engine start."""
