"""Parts of benches that are more than one file."""
