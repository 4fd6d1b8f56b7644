"""The commands of `trace-bench` that ask a model, one module each."""
