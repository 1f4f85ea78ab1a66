"""Requests to a simulated fleet: recorded, generated, or a file's."""
