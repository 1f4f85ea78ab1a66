"""Runs of several policies on a workload, and their numbers."""
