"""One file per claim of the README. Run all: ``make bench``; results go to ``benchmarks/results``."""
