"""Benchmarks: every figure that the documents quote comes from `python -m bench <name>`.

Figures are ratios and medians of interleaved rounds, with CPU seconds beside wall seconds: machines are shared.
"""
