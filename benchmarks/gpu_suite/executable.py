"""Programs compiled on a machine without a GPU: made there, loaded and checked here.

  JAX_PLATFORMS=cpu python -m benchmarks.gpu_suite.executable --target=h100 --file=decode.bin

writes one attention program; `python -m benchmarks.gpu_suite --executable=decode.bin` loads it on
the GPU, runs it and compares the result with the float32 reference. Both sides need the same
version of jax, and the file is loaded with pickle: do not load what somebody else made.
"""

import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import serialize_executable

from benchmarks.gpu_suite import correctness
from benchmarks.gpu_suite.stage import Case, Context, Row, Stage
from pallas_paged import AttentionMetadata, deviceless, paged_attention
from pallas_paged.models import command_line
from pallas_paged.ops.attention import arg_specs
from pallas_paged.ops.attention.arg_specs import AttentionArguments, AttentionSpec

HOST = "cpu"


def specs() -> dict[str, AttentionSpec]:
    """Returns the specs that a program can be made for, by name."""
    every = [*correctness.gpu_specs(), *correctness.interpreted_specs(), *arg_specs.SPECS]
    return {spec.name: spec for spec in every}


def _flat(arguments: AttentionArguments) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Returns arrays in a plain tuple, which serializes, and the options that are no arrays."""
    m = arguments.metadata
    fixed = {k: v for k, v in arguments.options.items() if not isinstance(v, jax.Array)}
    arrays = {k: v for k, v in arguments.options.items() if isinstance(v, jax.Array)}
    if arrays:
        raise ValueError(f"specs with {', '.join(arrays)} are not for this; choose another")
    return (*arguments.arrays[:3], m.block_tables, m.seq_lens, m.query_start_loc), fixed


def _attend(
    implementation: str, options: dict[str, Any], max_query_len: int, *arrays: jax.Array
) -> Any:
    q, k, v, tables, lens, starts = arrays
    unread = jnp.zeros(q.shape[0], jnp.int32)
    metadata = AttentionMetadata(unread, unread, tables, lens, starts, max_query_len)
    return paged_attention(
        q, k, v, metadata, **options, return_lse=True, implementation=implementation
    )


def build(name: str, target: str, implementation: str) -> bytes:
    """Returns the content of a file with the program for the spec `name`.

    Args:
      name: of `specs()`.
      target: one of `deviceless.TARGETS`, or "cpu" for this machine.
      implementation: of `paged_attention`.
    """
    arguments = arg_specs.build(specs()[name])
    arrays, options = _flat(arguments)
    attend = functools.partial(_attend, implementation, options, arguments.metadata.max_query_len)
    if target == HOST:
        with deviceless.without_compilation_cache():  # what comes from there is not whole
            compiled = jax.jit(attend).lower(*arrays).compile()
    else:
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        compiled = deviceless.compile_for(target, attend, *shapes)
    return pickle.dumps((name, serialize_executable.serialize(compiled)))


def run(path: str, context: Context) -> Row:
    """Loads the file's program, runs it and compares the result."""
    del context
    with open(path, "rb") as file:
        name, (payload, in_tree, out_tree) = pickle.load(file)
    arguments = arg_specs.build(specs()[name])
    arrays, _ = _flat(arguments)
    program = serialize_executable.deserialize_and_load(
        payload, in_tree, out_tree, execution_devices=jax.devices()[:1]
    )
    out, lse = program(*arrays)
    return {"spec": name, "file_bytes": len(payload)} | correctness.check_attention(
        arguments, out, lse
    )


def _cases(context: Context) -> list[Case]:
    if context.executable is None:
        return []
    path = context.executable
    return [Case(f"executable {path}", functools.partial(run, path))]


STAGE = Stage("executable", 40, 35, _cases, ("spec", "error", "lse_error"), toy=False)


def main() -> None:
    """Writes the file."""
    content = build(_SPEC.value, _TARGET.value, _IMPLEMENTATION.value)
    with open(_FILE.value, "wb") as file:
        file.write(content)
    print(f"{_FILE.value}: {len(content)} bytes, {_SPEC.value!r} for {_TARGET.value}")


if __name__ == "__main__":
    _TARGET = flags.DEFINE_enum("target", "h100", [*deviceless.TARGETS, HOST], "The GPU.")
    _SPEC = flags.DEFINE_enum("spec", "decode block 16", list(specs()), "What it computes.")
    _IMPLEMENTATION = flags.DEFINE_enum(
        "implementation", "mosaic_gpu", ["mosaic_gpu", "xla", "reference"], "How."
    )
    _FILE = flags.DEFINE_string("file", None, "File to write.", required=True)
    command_line.run(main)
