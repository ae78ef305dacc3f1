"""Shared parts of the benchmarks: command line, timing, reports, and the networks under test."""
