"""The programs between steps, which change what the device keeps of the rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_paged.engine.device.row_state import edit_masks, edit_rows
from pallas_paged.engine.device.rows import Rows, edit_tables


def edit_function(kind: str, *, looks: bool) -> Callable[..., Any]:
    """Returns the function of a program, whose first argument is donated.

    Args:
      kind: "edit_tables", of `Rows` and i32[2, K], places and blocks; "edit_rows" or "edit_masks",
        see `row_state`.
      looks: see `row_state.edit_rows`.
    """
    functions: dict[str, Callable[..., Any]] = {
        "edit_tables": _edit_tables,
        "edit_rows": functools.partial(edit_rows, looks=looks),
        "edit_masks": edit_masks,
    }
    return functions[kind]


def _edit_tables(rows: Rows, edit: jax.Array) -> Rows:
    return edit_tables(rows, *edit)
