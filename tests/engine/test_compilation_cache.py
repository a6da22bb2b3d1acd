"""What one start compiled, the next one finds, also with a little less free memory."""

import os
import pathlib
import subprocess
import sys

from tests.models.references import DATA

PROGRAM = """
import sys
import jax
from pallas_paged.engine import LLM, SamplingParams

hits, misses = [], []
jax.monitoring.register_event_listener(
    lambda event, **_: {
        "/jax/compilation_cache/cache_hits": hits,
        "/jax/compilation_cache/cache_misses": misses,
    }.get(event, []).append(event)
)
llm = LLM(
    sys.argv[1],
    compilation_cache_dir=sys.argv[2],
    kv_cache_memory_bytes=int(sys.argv[3]),
    max_num_seqs=2,
    max_num_batched_tokens=16,
    compile_ahead=True,
)
prompts = [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [8] * 20}]
llm.generate(prompts, SamplingParams(temperature=0), use_tqdm=False)
print(len(hits), len(misses), llm.engine.memory.num_usable_blocks)
"""


CACHE_SETTINGS = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def start(folder: pathlib.Path, pool_bytes: int) -> tuple[int, int, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, DATA / "llama-mha-tied", folder, str(pool_bytes)],
        check=True,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in CACHE_SETTINGS},
    )
    hits, misses, blocks = map(int, done.stdout.split()[-3:])
    return hits, misses, blocks


def test_a_second_start_compiles_nothing(tmp_path: pathlib.Path) -> None:
    block_bytes = 2 * 2 * 4 * 16 * 8 * 4
    _, misses, blocks = start(tmp_path, 15 * block_bytes)
    assert misses >= 3
    again_hits, again_misses, again_blocks = start(tmp_path, 15 * block_bytes + block_bytes // 2)
    assert again_blocks == blocks
    assert again_misses == 0
    assert again_hits >= misses
