"""Freezes what a process has imported, for its forks: none of them walks through it when it ends.

Imported last by the process of `tests.programs` from which programs are forked.
"""

import gc

gc.collect()
gc.freeze()
