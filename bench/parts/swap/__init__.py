"""Parts of swap.py."""
