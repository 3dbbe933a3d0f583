"""The endpoint, ours: the same protocol on your own machine."""
