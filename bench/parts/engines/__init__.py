"""Parts of engines.py and engines_transformers.py."""
