"""The commands `trace-bench train` and `trace-bench relearn`."""
