"""The endpoint's queue: from an accepted submit to its response."""
