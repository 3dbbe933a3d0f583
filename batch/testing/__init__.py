"""Fakes that are part of the package, for users' tests; contract tests check them against the real parts."""
