"""Exception types. All errors derive from WarmServeError, except wrong arguments (ValueError,
TypeError), waits that time out (TimeoutError) and errors of the file system (OSError)."""


class WarmServeError(Exception):
    """Base of this library's errors; raised itself for use after close or in a forked child."""


class OutOfDeviceMemory(WarmServeError, MemoryError):
    """The request exceeds the arena or the device even if nothing is leased."""


class StagingTimeout(WarmServeError, TimeoutError):
    """No chunk of the staging pool became free in time."""


class Busy(WarmServeError):
    """Refused because of current leases; a later attempt may succeed."""


class Cancelled(WarmServeError):
    """The work was cancelled before it was complete."""


class CorruptCheckpoint(WarmServeError, ValueError):
    """A checkpoint file is malformed, or has changed since it was registered."""


class StaleView(WarmServeError):
    """The bytes behind a view are not guaranteed to be the model's."""


class DeviceLost(WarmServeError):
    """The device reported an error from which only a new process can recover."""
