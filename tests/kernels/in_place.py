"""Checks on programs that update the KV cache."""

import re

import jax


def assert_updates_in_place(update, kv_cache, *args):
    """Asserts that `update(kv_cache, *args)` under donation writes into the cache's own buffers."""
    compiled = jax.jit(update, donate_argnums=0).lower(kv_cache, *args).compile()
    text = compiled.as_text()
    aliases = (f"{{{i}}}: ({i}, {{}}, may-alias)" for i, _ in enumerate(jax.tree.leaves(kv_cache)))
    assert f"input_output_alias={{ {', '.join(aliases)} }}" in text
    assert compiled.memory_analysis().temp_size_in_bytes < kv_cache.k.nbytes
    shape = ",".join(map(str, kv_cache.k.shape))
    operations = set(re.findall(rf"= \w+\[{shape}\]\S* ([\w-]+)\(", text))
    assert "parameter" in operations
    assert not operations & {"copy", "convert", "transpose", "broadcast", "concatenate"}, operations


def assert_donated(kv_cache, updated):
    """Asserts that the old arrays are gone and the new ones are not."""
    jax.block_until_ready(updated)
    assert all(array.is_deleted() for array in jax.tree.leaves(kv_cache))
    assert not any(array.is_deleted() for array in jax.tree.leaves(updated))
