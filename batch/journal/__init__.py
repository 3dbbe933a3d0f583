"""Durable job state: the states and events of a job, and the SQLite journal that stores them."""
