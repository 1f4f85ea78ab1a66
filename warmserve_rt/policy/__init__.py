"""Decide which layers of which models stay, and on which devices.

Pure functions over snapshots: no clock, no dependency on the runtime, and no I/O except that a
forecaster can be saved to a file."""
