"""Fault injection: what the endpoint does wrong, and when."""
