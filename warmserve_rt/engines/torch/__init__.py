"""Helpers for any torch module; they need torch only."""
