"""Code shared by several benches."""
