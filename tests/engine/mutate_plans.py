"""Breaks how a model is shared, and how plans read and count it, on purpose.

python -m tests.engine.mutate_plans                  # all of them, about half a minute each
python -m tests.engine.mutate_plans "a name" ...     # some, by name
"""

import sys

from tests.mutations import Mutation, run

_COLLECTIVES = "pallas_paged/collectives.py"
_EXCHANGES = "pallas_paged/engine/device/exchanges.py"
_BUNDLE = "pallas_paged/engine/device/bundle.py"
_STEPS = "tests/engine/test_sharded_steps_deviceless.py"
_READING = "tests/kernels/test_collectives.py"
_BUNDLES = "tests/engine/test_bundle.py"
_PLANS = "tests/benchmarks/test_parallel_plans.py"

MUTATIONS = {
    "caches that lie whole on each device": Mutation(
        "pallas_paged/engine/device/placement.py",
        "BY_HEAD = PartitionSpec(None, AXIS)",
        "BY_HEAD = PartitionSpec()",
        _STEPS,
    ),
    "an all-reduce too many": Mutation(
        "pallas_paged/models/layers.py", "y = summed(y)", "y = summed(summed(y))", _STEPS
    ),
    "a vocabulary that lies whole on each device": Mutation(
        "pallas_paged/models/sharding.py",
        '_DIVIDED = frozenset({"kv_heads", "heads", "mlp", "vocab"})',
        '_DIVIDED = frozenset({"kv_heads", "heads", "mlp"})',
        _STEPS,
    ),
    "a first half with its operands": Mutation(
        _COLLECTIVES, "elements[1] if has_operands", "shape if has_operands", _READING
    ),
    "a loop that turns once": Mutation(
        _COLLECTIVES, "inner = times * (int(turns[1])", "inner = times * (1", _READING
    ),
    "a loop of unknown turns that turns once": Mutation(
        _COLLECTIVES, "inner = None\n", "inner = times\n", _READING
    ),
    "a last layer of all tokens": Mutation(
        _EXCHANGES, "tokens if bucket.is_full or deterministic else logits", "tokens", _STEPS
    ),
    "one run of a loop of several steps": Mutation(
        _EXCHANGES,
        'Exchanges("all-reduce", steps * count, steps * elements * itemsize)',
        'Exchanges("all-reduce", count, elements * itemsize)',
        _STEPS,
    ),
    "a bundle that is loaded for one of the devices": Mutation(
        _BUNDLE, "programs.placement.devices)", "programs.placement.devices[:1])", _BUNDLES
    ),
    "a bundle that one of several processes loads": Mutation(
        "pallas_paged/engine/loading.py", 'in ("bundle", ', "in (", _BUNDLES
    ),
    "an engine of one device that loads a bundle of two": Mutation(
        "pallas_paged/engine/compiling.py", '    "tensor_parallel_size",\n', "", _BUNDLES
    ),
    "a ring that sends everything": Mutation(
        "benchmarks/simulation/cost_model.py",
        "passes * (num_devices - 1) / num_devices",
        "passes",
        _PLANS,
    ),
    "latencies that cost nothing": Mutation(
        "benchmarks/parallel/scaling.py", "one.count * link.latency_s", "0.0", _PLANS
    ),
    "memory that others have": Mutation(
        "benchmarks/parallel/compiled.py",
        "int(card_bytes * share) - NOT_OURS_BYTES",
        "int(card_bytes * share)",
        _PLANS,
    ),
}


if __name__ == "__main__":
    sys.exit(run(MUTATIONS, sys.argv[1:]))
