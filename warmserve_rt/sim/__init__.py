"""Simulate a fleet that serves workloads under policies to compare."""
