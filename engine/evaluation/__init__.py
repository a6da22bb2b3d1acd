"""Adapter for lm-evaluation-harness: what its tasks ask for, by an engine in this process."""
