"""Faults on purpose: what the endpoint does wrong, and when."""
