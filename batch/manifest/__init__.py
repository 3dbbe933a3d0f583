"""Read a manifest, cross it with a sweep and plan its jobs."""
