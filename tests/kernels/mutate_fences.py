"""Takes the fences out of the prefill kernel, one at a time; see `tests.mutations`.

Those of the decode kernel are among `mutate_decode`'s.

python -m tests.kernels.mutate_fences
"""

import sys

from tests.mutations import Mutation, run

_KERNEL = "pallas_paged/ops/attention/mosaic_gpu_prefill.py"
_LOAD = "pallas_paged/ops/attention/mosaic_gpu_prefill_load.py"
_TESTS = "tests/kernels/test_fences.py::test_prefill"

MUTATIONS = {
    "queries not committed": Mutation(
        _KERNEL,
        "layout=_MATRIX)\n        plgpu.commit_smem()",
        "layout=_MATRIX)",
        f"{_TESTS}[pieces]",
    ),
    "masked values not committed": Mutation(
        _KERNEL, "plgpu.commit_smem()\n        _meet(pair)", "_meet(pair)", f"{_TESTS}[pieces]"
    ),
    "weights not committed": Mutation(
        _KERNEL,
        "buffer[...] = weights\n    plgpu.commit_smem()",
        "buffer[...] = weights",
        f"{_TESTS}[weights]",
    ),
    "staged results not committed": Mutation(
        _KERNEL,
        "part.astype(problem.dtype)\n        plgpu.commit_smem()",
        "part.astype(problem.dtype)",
        f"{_TESTS}[pieces]",
    ),
    "results staged over others that are sent": Mutation(
        _KERNEL, "plgpu.wait_smem_to_gmem(0)", "pass", f"{_TESTS}[pieces]"
    ),
    "converted numbers not committed": Mutation(
        _LOAD, "plgpu.commit_smem()", "pass", f"{_TESTS}[quantised]"
    ),
}

if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
