"""TRACE-Bench: train an aligned language model on tasks in sequence and measure what it keeps."""

__version__ = "0.1.0"
