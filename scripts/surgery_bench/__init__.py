"""The parts of scripts/bench_surgery.py."""
