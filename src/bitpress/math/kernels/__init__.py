"""Triton versions of hot loops, each held against its pure function in the tests."""
