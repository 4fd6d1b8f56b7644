"""Measures of what a run forgot: pure functions, each with its source."""
