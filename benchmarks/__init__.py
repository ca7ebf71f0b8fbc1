"""Timing every operation against its rivals: workloads, measurement, reports.

`pytest benchmarks` runs the `bench_*.py` files; `tilewise bench` and the demo use the same
workloads and the same measurement without pytest.
"""
