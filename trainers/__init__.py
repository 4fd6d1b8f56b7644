"""How the model learns: one method is one file, runnable as `python -m trainers.<method>`."""
