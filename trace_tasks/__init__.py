"""What is measured: lm-eval task YAMLs and their scoring. `trace-bench tasks-path` prints this folder."""
