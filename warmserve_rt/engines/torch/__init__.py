"""For any torch module; needs torch alone."""
