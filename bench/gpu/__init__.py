"""What a GPU has to show: `python -m bench.gpu`, see `bench/gpu/__main__.py`."""
