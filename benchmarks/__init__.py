"""Benchmark suites of fastrobust, and the harness that runs them.

Installed as ``fastrobust.benchmarks``; in a checkout it is the top-level package ``benchmarks``.
Run it with ``fastrobust bench`` or ``python -m benchmarks``; docs/benchmarks.md explains the output.
"""
