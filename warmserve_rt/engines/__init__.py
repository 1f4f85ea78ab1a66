"""Adapters that run serving engines on a runtime's memory; each package needs its engine."""
