"""The simulator: workloads, costs, and the policies that serve them, in simulated time."""
