"""The commands `trace-bench judge` and `trace-bench annotate`."""
