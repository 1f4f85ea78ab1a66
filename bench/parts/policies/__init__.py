"""Parts of policies.py."""
