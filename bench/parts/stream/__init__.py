"""Parts of stream.py."""
