"""The program of lm-evaluation-harness with `--model pallas-paged`.

  python -m pallas_paged.engine.evaluation --model pallas-paged --model_args pretrained=FOLDER \
      --tasks hellaswag

All flags are lm_eval's; `--model_args` are those of `harness.PallasPagedLM`. lm_eval releases that
look for entry points of the group `lm_eval.models` (those after 0.4.13) find the model by
themselves: there `lm_eval --model pallas-paged` is the same.
"""

import importlib
import importlib.util
import sys

NAME = "pallas-paged"
TARGET = "pallas_paged.engine.evaluation.harness:PallasPagedLM"


def main() -> None:
    """Runs lm_eval's program on the flags."""
    if importlib.util.find_spec("lm_eval") is None:
        print("error: lm_eval is not installed; pip install 'pallas-paged[eval]'", file=sys.stderr)
        sys.exit(2)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    importlib.import_module("lm_eval.models")  # its own models, which it skips once there is one
    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)
    cli_evaluate()


if __name__ == "__main__":
    main()
