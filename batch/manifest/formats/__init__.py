"""Readers of the manifest formats."""
