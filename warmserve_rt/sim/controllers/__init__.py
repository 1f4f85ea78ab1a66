"""What starts instances on a simulated fleet and loads layers."""
