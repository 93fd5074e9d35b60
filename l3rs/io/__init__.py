"""Optimizers in files: checkpoints, where they are found, and how files are read and written. It needs no JAX."""
