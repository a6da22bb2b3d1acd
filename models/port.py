"""Turns a Hugging Face folder into a ported one: its tensors as an Orbax checkpoint.

  python -m pallas_paged.models.port --hf_dir=FOLDER --out=PORTED
  python -m pallas_paged.models.port --hf_dir=FOLDER --out=PORTED --reference=reference.npz
  python -m pallas_paged.models.port --out=PORTED --reference=reference.npz

`LLM` and `load_model` take either folder. Tensors are streamed one by one and keep their names and
their bits, unless --dtype asks for another type. `pallas_paged.models.export` is the way back.

--reference compares the model in --out with logits that `pallas_paged.models.record_reference`
recorded where torch is installed, and fails when they differ by more than --tolerance.
Everything runs on the CPU. Exit status: 0; 1 outside the tolerance; 2 for an error.
"""

import logging
import sys
from pathlib import Path

import jax
from absl import flags

from pallas_paged.models import command_line
from pallas_paged.models.config import DTYPES
from pallas_paged.models.loader import load_config, load_model
from pallas_paged.models.parity import Reference, compare
from pallas_paged.models.porting import port

_HF_DIR = flags.DEFINE_string(
    "hf_dir", None, "Folder with a Hugging Face checkpoint; without it --out is compared only."
)
_OUT = flags.DEFINE_string("out", None, required=True, help="The ported folder to make.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", *DTYPES], "Type of the ported tensors; auto keeps each as it is."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --out if it is a ported folder.")
_REFERENCE = flags.DEFINE_string(
    "reference", None, "File of record_reference to compare the model in --out with."
)
_TOLERANCE = flags.DEFINE_float(
    "tolerance",
    None,
    "Largest error of a logit, as a share of the recorded logits' root mean square; by default it "
    "follows from the type that the reference was computed in.",
    lower_bound=0,
)


def main() -> None:
    """Ports, compares, or both."""
    if _HF_DIR.value is None and _REFERENCE.value is None:
        raise ValueError("give --hf_dir to port, --reference to compare, or both")
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("pallas_paged").setLevel(logging.WARNING)
    out = Path(_OUT.value)
    # Read first: a wrong name should not cost a port.
    reference = None if _REFERENCE.value is None else Reference.load(Path(_REFERENCE.value))
    if _HF_DIR.value is not None:
        print(port(Path(_HF_DIR.value), out, _DTYPE.value, overwrite=_OVERWRITE.value))
    if reference is None:
        return
    config = load_config(out).for_length(reference.longest)
    model = load_model(out, reference.dtype, config=config)
    parity = compare(model, reference, _TOLERANCE.value)
    print(parity)
    sys.exit(0 if parity.ok else 1)


if __name__ == "__main__":
    command_line.run(main)
