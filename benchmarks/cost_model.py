"""The error of the simulation's cost model, beside a real engine on this machine.

  python -m benchmarks.cost_model                           # a random model of 20 million
  python -m benchmarks.cost_model --random_model=100m --json=FILE

The constants are fitted to the steps of one run; the errors are those of another one, see
`benchmarks.simulation.calibration`.
"""

import dataclasses
import json
import pathlib
import tempfile

from absl import flags

from benchmarks import random_models, tables
from benchmarks.simulation.calibration import FITTED, calibrate, make_llm
from pallas_paged.models import command_line

_MODEL = flags.DEFINE_enum(
    "random_model", "20m", list(random_models.CONFIGS), "Shape of the model."
)
_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 32, "Of each run.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "Of requests and tokens.", lower_bound=0)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")


def main() -> None:
    """Prints the constants and the errors."""
    with tempfile.TemporaryDirectory() as folder:
        random_models.write_config(_MODEL.value, pathlib.Path(folder))
        found = calibrate(make_llm(folder), _NUM_REQUESTS.value, _SEED.value)
    costs = dataclasses.asdict(found.costs)
    tables.show(
        f"constants, microseconds, fitted to {found.num_steps} steps",
        [{name.removesuffix("_s"): 1e6 * costs[name] for name in FITTED}],
    )
    errors = {
        "median error of a step": found.step_error,
        "run: simulated / measured": found.run_ratio,
    }
    tables.show("on requests that were not fitted to", [errors])
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps({"costs": costs} | errors, indent=1))


if __name__ == "__main__":
    command_line.run(main)
