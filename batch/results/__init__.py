"""The results table: its columns, the writer of `results.parquet`, and the export from the journal."""
