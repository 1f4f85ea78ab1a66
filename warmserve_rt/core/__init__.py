"""One device's memory, shared by many models: runtimes, models, leases, views."""
