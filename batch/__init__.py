"""restyle: turn a manifest of images and prompts into a Parquet table of restyled images.

The face of the package is `batch.api` (library) and `batch.cli.commands` (the `restyle` command). This module stays
empty, so that importing the pure core loads no I/O library.
"""
