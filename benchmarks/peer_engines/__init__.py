"""Engines for `benchmarks.peers`, one driver each; a driver imports nothing of this project's.

Only that of our own engine does. A driver runs in a Python of its engine's as a script, beside
`peer_protocol`, which says what it reads and answers.
"""
