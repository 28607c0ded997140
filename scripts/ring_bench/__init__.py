"""The parts of bench_ring.py: one file for each section of its report."""
