"""What is measured, each by one script that says how: see docs/benchmarks.md."""
