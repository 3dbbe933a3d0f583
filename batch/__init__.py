"""restyle: turn a manifest of pictures and prompts into a Parquet table of restyled pictures.

The face of the package is `batch.api` (library) and `batch.cli.commands` (the `restyle` command). This module stays
empty, so that importing the pure core loads no I/O library.
"""
