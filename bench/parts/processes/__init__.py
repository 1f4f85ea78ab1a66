"""The parts of bench/processes.py."""
