"""Parts of switch.py."""
