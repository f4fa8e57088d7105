"""Measurements: always ratios taken in one run, since machines are shared and noisy.

`psgd bench` says what a step, its compilation and its memory cost beside other optimizers; see docs/benchmarks.md.
"""
