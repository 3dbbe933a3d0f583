"""The process and the machine: descriptors, sockets, signals, paths. Knows nothing about jobs."""
