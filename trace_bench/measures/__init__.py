"""Measures of forgetting: pure functions of numpy arrays, each with its source."""
