"""Bounds with which results of the benches are compared."""
