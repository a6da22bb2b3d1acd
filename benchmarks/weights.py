"""What new weights cost an engine, by the form in which a trainer has them.

An engine that merges projections takes its own layout as it is, and joins tensors that are apart.
One that keeps them apart (`merge_projections=False`) takes those as they are, and runs more
products in each step. This prints both costs: of an update, and of decode steps.

  python -m benchmarks.weights --random_model=100m
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from benchmarks import random_models, tables
from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.device.pool_size import num_bytes
from pallas_paged.models import CausalLM, command_line
from pallas_paged.models.registry import FAMILIES, config_from_hf
from pallas_paged.models.tensors import tensors_of

_RANDOM_MODEL = flags.DEFINE_enum(
    "random_model", "20m", list(random_models.CONFIGS), "Shape of the model, with random weights."
)
_NUM_UPDATES = flags.DEFINE_integer("num_updates", 20, "Updates of each kind.", lower_bound=1)
_NUM_RUNS = flags.DEFINE_integer("num_runs", 5, "Runs of the decode steps.", lower_bound=1)
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 64, "Tokens of each sequence.", lower_bound=2)
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "Numbers of sequences that decode.")

_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

_PROMPT_LEN = 32


def main() -> None:
    """Measures both, and prints a table of each."""
    name = _RANDOM_MODEL.value
    config = config_from_hf(random_models.CONFIGS[name])
    dtype = config.checkpoint_dtype or "float32"
    model = FAMILIES[config.architecture].model(config, dtype=dtype, rngs=nnx.Rngs(0))
    batches = [int(text) for text in _BATCHES.value]
    options: dict[str, Any] = {
        "max_num_seqs": max(batches),
        "max_model_len": _PROMPT_LEN + _NUM_TOKENS.value,
        "background_compilation": False,
    }
    engines = {
        "merged": LLM.from_model(model, **options),
        "apart": LLM.from_model(model, merge_projections=False, **options),
    }
    size = num_bytes(nnx.state(model)) / 2**20
    device = jax.devices()[0].device_kind
    print(f"model: random {name}, {dtype}, {size:.1f} MiB; jax {jax.__version__} on {device}")
    figures = {"updates": _updates(model, engines), "steps": _steps(engines, batches)}
    tables.show("an update of the weights", figures["updates"])
    title = "a token of each sequence, its share of the prompts included"
    tables.show(title, figures["steps"])
    if _JSON.value:
        with open(_JSON.value, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


def _updates(model: CausalLM, engines: dict[str, LLM]) -> list[dict[str, Any]]:
    """Returns what an update costs by the form of the state, medians of all but the first two."""
    own, apart = nnx.state(model), tensors_of(nnx.state(model))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), apart)
    narrow = LLM.from_model(
        model, dtype="bfloat16", **{f: getattr(engines["merged"].config, f) for f in _SAME}
    )
    cases: list[tuple[str, str, LLM, Any]] = [
        ("merged", "our own layout", engines["merged"], own),
        ("merged", "a checkpoint's tensors", engines["merged"], apart),
        ("merged, bfloat16", "a checkpoint's tensors in float32", narrow, wide),
        ("apart", "a checkpoint's tensors", engines["apart"], apart),
        ("apart", "our own layout", engines["apart"], own),
    ]
    rows = []
    for engine, state, llm, arrays in cases:
        seconds = []
        for _ in range(_NUM_UPDATES.value + 2):  # two of them compile
            begin = time.perf_counter()
            update = llm.update_weights(arrays)
            jax.block_until_ready(llm.runner.programs.params)
            seconds.append(time.perf_counter() - begin)
        rows.append(
            {
                "engine": engine,
                "state": state,
                "as they are": update.num_taken,
                "made": len(update.made),
                "cast": len(update.cast),
                "ms": 1e3 * statistics.median(seconds[2:]),
                "first ms": 1e3 * seconds[0],
            }
        )
    return rows


_SAME = ("max_num_seqs", "max_model_len", "background_compilation")


def _steps(engines: dict[str, LLM], batches: list[int]) -> list[dict[str, Any]]:
    """Returns what decode steps cost both engines, side by side, medians."""
    rows = []
    for batch in batches:
        prompts = [{"prompt_token_ids": [3 + i] * _PROMPT_LEN} for i in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=_NUM_TOKENS.value, ignore_eos=True)
        runs: dict[str, Callable[[], float]] = {
            name: _timed(llm, prompts, params) for name, llm in engines.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for run in range(_NUM_RUNS.value + 1):
            for name, measure in runs.items():
                took = measure()
                if run:  # the first one compiles
                    seconds[name].append(took)
        merged, apart = (statistics.median(seconds[name]) for name in ("merged", "apart"))
        per_step = 1e3 / _NUM_TOKENS.value
        rows.append(
            {
                "sequences": batch,
                "merged ms": merged * per_step,
                "apart ms": apart * per_step,
                "apart/merged": apart / merged,
            }
        )
    return rows


def _timed(llm: LLM, prompts: Any, params: SamplingParams) -> Callable[[], float]:
    def measure() -> float:
        llm.reset_prefix_cache()
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    return measure


if __name__ == "__main__":
    command_line.run(main)
