"""Run several policies on a workload, and compute the numbers of the runs."""
