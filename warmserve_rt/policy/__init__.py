"""Decide which layers of which models stay, and on which devices.

Pure functions over snapshots: no I/O, no clock, and no dependency on the runtime."""
