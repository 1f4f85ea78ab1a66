"""Parts of gpu.py and gpu.sh."""
