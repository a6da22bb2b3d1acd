"""Attention as one program: its operations, compiled one by one, take several times as long."""

import jax

from pallas_paged import paged_attention


def attend(arguments, implementation, **options):
    """Returns (out, lse) of an implementation for `arguments.build`'s arrays and options.

    Traced in every call: tests change what a trace reads.
    """
    options = arguments.options | options
    given = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    fixed = {name: value for name, value in options.items() if name not in given}

    @jax.jit
    def attention(arrays, given):
        return paged_attention(
            *arrays, **fixed, **given, return_lse=True, implementation=implementation
        )

    return attention(arguments.arrays, given)
