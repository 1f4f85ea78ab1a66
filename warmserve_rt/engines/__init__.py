"""Serving engines taught to run from a runtime's memory; each module needs its engine installed."""
