"""What is asked for: reading a manifest, crossing it with a sweep, planning its jobs."""
