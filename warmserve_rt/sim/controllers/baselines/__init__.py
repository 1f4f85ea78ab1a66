"""Other policies and bounds, with which this project's policy is compared."""
