"""A backend for Triton's interpreter, which vLLM's model runner for GPUs needs to start without a GPU."""
