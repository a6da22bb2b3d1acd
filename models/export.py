"""Turns a ported folder back into a Hugging Face one, so that nothing is locked in.

  python -m pallas_paged.models.export --checkpoint=PORTED --out=FOLDER

Names, types and bytes of the tensors are those that were ported; how they are spread over files is
not kept. Runs on the CPU. Exit status: 0; 2 for an error.
"""

from pathlib import Path

import jax
from absl import flags

from pallas_paged.models import command_line
from pallas_paged.models.porting import export

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, required=True, help="The ported folder.")
_OUT = flags.DEFINE_string("out", None, required=True, help="The Hugging Face folder to make.")
_MAX_SHARD_BYTES = flags.DEFINE_integer(
    "max_shard_bytes",
    1 << 30,
    "Largest safetensors file, as far as no single tensor is larger; also what is held in memory.",
    lower_bound=1,
)


def main() -> None:
    """Exports the checkpoint of the flags."""
    jax.config.update("jax_platforms", "cpu")
    print(export(Path(_CHECKPOINT.value), Path(_OUT.value), max_shard_bytes=_MAX_SHARD_BYTES.value))


if __name__ == "__main__":
    command_line.run(main)
