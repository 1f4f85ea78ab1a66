"""Requests to a simulated fleet: recorded, generated, or read from a file."""
