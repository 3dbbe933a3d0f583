"""What comes out: the columns of `results.parquet` and the sink that writes it."""
