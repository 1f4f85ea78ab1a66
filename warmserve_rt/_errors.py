"""The exception types. All but wrong arguments (ValueError) and waits whose time ran out
(TimeoutError) derive from WarmServeError."""


class WarmServeError(Exception):
    """Base of this library's errors; raised itself for use after close or in a forked child."""


class OutOfDeviceMemory(WarmServeError, MemoryError):
    """More than the arena or the device has, even with nothing leased."""


class StagingTimeout(WarmServeError, TimeoutError):
    """No chunk of the staging pool came free in time."""


class Busy(WarmServeError):
    """Refused because of what is leased now; may succeed later."""


class Cancelled(WarmServeError):
    """The work was called off before it was complete."""


class CorruptCheckpoint(WarmServeError, ValueError):
    """A checkpoint file is malformed, or is not the file it was when it was registered."""


class StaleView(WarmServeError):
    """The bytes behind a view are not, or not any more, guaranteed to be the model's."""


class DeviceLost(WarmServeError):
    """The device reported an error that only a new process can get over."""
