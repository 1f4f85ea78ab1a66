"""Bounds that results of the benches are compared with."""
