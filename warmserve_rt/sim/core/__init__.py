"""The simulated fleet: events, devices, links, memory, instances."""
