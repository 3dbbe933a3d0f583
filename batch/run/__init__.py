"""Running a plan: admission, submits, polling, verdicts, transfers, observers."""
