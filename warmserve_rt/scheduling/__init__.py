"""Decide from the forecasts of policy/ which layers runtimes hold, and load them."""
