"""Measures of what was learned and forgotten: pure functions, one topic a file."""
