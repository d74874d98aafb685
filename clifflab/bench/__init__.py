"""Benchmarks: the plain way and the fast ways in one process, equal results asserted."""
