"""Benchmarks: ``python -m bench CASE…``. See README.md in this folder for what is measured, and how."""
