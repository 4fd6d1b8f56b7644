"""The tasks: lm-eval YAMLs and their scoring. `trace-bench tasks-path` prints this folder."""
