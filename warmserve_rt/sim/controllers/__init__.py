"""The controllers, which start instances on a simulated fleet and load layers."""
