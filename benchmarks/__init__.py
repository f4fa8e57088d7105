"""Measurements: always ratios taken in one run, since machines are shared and noisy.

`python -m benchmarks.step` says what a step and what its compilation cost; see docs/benchmarks.md.
"""
