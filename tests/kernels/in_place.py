"""Checks on programs that update the KV cache."""

import re

import jax


def assert_updates_in_place(update, kv_cache, *args):
    """Asserts that `update(kv_cache, *args)` under donation writes into the cache's own buffers."""
    compiled = jax.jit(update, donate_argnums=0).lower(kv_cache, *args).compile()
    text = compiled.as_text()
    assert "input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, may-alias) }" in text
    assert compiled.memory_analysis().temp_size_in_bytes < kv_cache.k.nbytes
    shape = ",".join(map(str, kv_cache.k.shape))
    operations = set(re.findall(rf"= \w+\[{shape}\]\S* ([\w-]+)\(", text))
    assert "parameter" in operations
    assert not operations & {"copy", "convert", "transpose", "broadcast", "concatenate"}, operations


def assert_donated(kv_cache, updated):
    """Asserts that the old arrays are gone and the new ones are not."""
    jax.block_until_ready(updated)
    assert [array.is_deleted() for array in kv_cache] == [True, True]
    assert [array.is_deleted() for array in updated] == [False, False]
