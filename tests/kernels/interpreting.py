"""What tests that interpret the attention kernels share: arguments, tolerances, races found."""

import contextlib
import dataclasses

import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from benchmarks.attention_cases.arguments import build
from pallas_paged.dispatch import interpret_kernels
from pallas_paged.kv_cache import NULL_BLOCK

# Weights and results are rounded to the dtype, whose units at 1 are 2^-7 and 2^-10.
TOLERANCES = {"bfloat16": 2e-2, "float16": 3e-3}


def build_poisoned(spec):
    """`build`, with everything left of the windows poisoned, and its whole blocks freed."""
    arguments = build(spec)
    if spec.sliding_window is None:
        return arguments
    metadata = arguments.metadata
    tables = np.array(metadata.block_tables)
    options = dict(arguments.options)
    names = [name for name in ("k_scale", "v_scale") if name in options]
    caches = [np.array(cache, np.float32) for cache in arguments.arrays[1:3]]
    scales = [np.array(options[name]) for name in names]
    for row, (length, queries) in enumerate(zip(spec.seq_lens, spec.lens_of_queries, strict=True)):
        first = max(length - queries - spec.sliding_window + 1, 0)
        for position in range(first):
            block, offset = divmod(position, spec.block_size)
            for cache in caches:
                cache[tables[row, block], :, offset] = 127 if spec.cache_dtype == "int8" else np.nan
            for scale in scales:
                scale[tables[row, block], :, offset] = np.nan
        tables[row, : first // spec.block_size] = NULL_BLOCK
    return arguments._replace(
        k_cache=jnp.asarray(caches[0], arguments.k_cache.dtype),
        v_cache=jnp.asarray(caches[1], arguments.v_cache.dtype),
        metadata=dataclasses.replace(metadata, block_tables=jnp.asarray(tables)),
        options=options | dict(zip(names, map(jnp.asarray, scales), strict=True)),
    )


@contextlib.contextmanager
def interpreted(compute_capability=(9, 0)):
    """Interprets kernels; fails if their threads race, and leaves nothing behind if they fail."""
    try:
        with interpret_kernels(detect_races=True, compute_capability=compute_capability):
            yield
        assert not interpret_pallas_call.get_races().races_found
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()


def complete(spec, options):
    """The options as the implementations take them."""
    given = {"alibi_slopes": None, "sinks": None, "k_scale": None, "v_scale": None} | options
    return given | {"scale": spec.head_dim**-0.5 if spec.scale is None else spec.scale}
