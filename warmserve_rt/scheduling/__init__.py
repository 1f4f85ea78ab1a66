"""Decides what runtimes hold, from forecasts of policy/, and carries it out."""
