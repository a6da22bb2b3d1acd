"""Paged attention for CPUs."""
