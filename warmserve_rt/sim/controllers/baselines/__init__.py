"""Other policies, and bounds, to compare this project's with."""
