"""Which layers of which models stay, and where: pure functions over snapshots. No I/O, no clock,
and nothing of the runtime."""
