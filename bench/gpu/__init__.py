"""The measurements on a GPU: `python -m bench.gpu`, see `bench/gpu/__main__.py`."""
