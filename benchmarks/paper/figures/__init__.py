"""The figures, each a module of `jobs`, `rows` and `draw`; see `figure.Figure`."""
