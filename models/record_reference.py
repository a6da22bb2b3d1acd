"""Records what transformers computes with a checkpoint: the other side of `port --reference`.

  python -m pallas_paged.models.record_reference --hf_dir=FOLDER --out=reference.npz

Needs torch and transformers. Nothing of this package is used, so that a copy of this one file runs
by itself on another machine. The prompts are those of --prompt, or else random tokens.

The file holds the arrays that `record` returns, as `numpy.savez` writes them.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from absl import app, flags

_HF_DIR = flags.DEFINE_string(
    "hf_dir", None, required=True, help="Folder with a Hugging Face checkpoint."
)
_OUT = flags.DEFINE_string("out", None, required=True, help="File to write, such as reference.npz.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "Text for the folder's tokenizer; repeat the flag for several."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Type of weights and activations."
)
_NUM_GREEDY = flags.DEFINE_integer(
    "num_greedy", 32, "Tokens to generate greedily after each prompt.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random tokens.")

_RANDOM_LENGTHS = (1, 5, 16, 33, 8, 17, 24, 48)
NUM_WITH_LOGITS = 4
"""Of how many prompts all logits are recorded; the others have greedy tokens only."""


def record(
    model: Any, prompts: Sequence[np.ndarray], *, num_with_logits: int, num_greedy: int
) -> dict[str, np.ndarray]:
    """Returns what a transformers model computes, under the names that a reference file has.

    Args:
      model: a `transformers.PreTrainedModel` with a language head.
      prompts: token ids, i32[length] each.
      num_with_logits: how many of them, from the first on, have their logits recorded.
      num_greedy: tokens to generate for each; none of them ends a prompt early.

    Returns:
      prompts: i32[total length], one after the other; prompt_lengths: i32[P].
      logits: f32[total length of the first ones, V], at every position.
      greedy: i32[P, num_greedy], the greedy continuations.
      margins: f32[P, num_greedy], difference of the top two logits where each was chosen.
      dtype: the name of the model's dtype.
    """
    import torch

    logits, greedy, margins = [], [], []
    with torch.no_grad():
        for index, prompt in enumerate(prompts):
            tokens = torch.from_numpy(prompt.astype(np.int64))[None].to(model.device)
            if index < num_with_logits:
                logits.append(model(tokens).logits[0].float().cpu().numpy())
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=num_greedy,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            greedy.append(out.sequences[0, len(prompt) :].cpu().numpy())
            top = torch.cat(out.logits).float().topk(2).values
            margins.append((top[:, 0] - top[:, 1]).cpu().numpy())
    return {
        "prompts": np.concatenate(prompts).astype(np.int32),
        "prompt_lengths": np.array([len(prompt) for prompt in prompts], np.int32),
        "logits": np.concatenate(logits),
        "greedy": np.stack(greedy).astype(np.int32),
        "margins": np.stack(margins),
        "dtype": np.array(str(model.dtype).removeprefix("torch.")),
    }


def _prompts(hf_dir: str, model: Any) -> list[np.ndarray]:
    """Returns the prompts that the flags ask for."""
    longest = model.config.max_position_embeddings - _NUM_GREEDY.value
    if not _PROMPT.value:
        rng, vocab_size = np.random.default_rng(_SEED.value), model.config.vocab_size
        lengths = [length for length in _RANDOM_LENGTHS if length <= longest]
        return [rng.integers(0, vocab_size, length, np.int32) for length in lengths]
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    for text in _PROMPT.value:
        text.encode()  # half of a surrogate pair is a ValueError here, and a TypeError below
    prompts = [np.array(tokenizer.encode(text), np.int32) for text in _PROMPT.value]
    for text, prompt in zip(_PROMPT.value, prompts, strict=True):
        if not 0 < len(prompt) <= longest:
            raise ValueError(
                f"--prompt={text!r} has {len(prompt)} tokens; with --num_greedy="
                f"{_NUM_GREEDY.value} this model takes 1 to {longest}"
            )
    return prompts


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _refuse(f"{error}; --help lists the flags")


def _refuse(reason: str) -> NoReturn:
    print("error:", " ".join(reason.split()), file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str]) -> None:
    """Records the checkpoint of the flags."""
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}; all of them are --flag=value")
        _record_file(_HF_DIR.value, _OUT.value)
    except (ValueError, OSError, ImportError) as error:
        _refuse(str(error))


def _record_file(hf_dir: str, out: str) -> None:
    if os.path.exists(out):
        raise ValueError(f"--out={out} exists: remove it, or choose another name")
    if not os.path.isdir(hf_dir):
        raise FileNotFoundError(f"--hf_dir={hf_dir} is no folder: a model is a local folder")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"{error}: recording runs the checkpoint with transformers on torch, in an environment "
            "that has both; a copy of this file alone runs there too"
        ) from error
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            hf_dir, local_files_only=True, dtype=getattr(torch, _DTYPE.value)
        ).eval()
    except Exception as error:  # of many kinds, none of them documented
        raise ValueError(f"transformers cannot load {hf_dir}: {error}") from error
    prompts = _prompts(hf_dir, model)
    recorded = record(model, prompts, num_with_logits=NUM_WITH_LOGITS, num_greedy=_NUM_GREEDY.value)
    with open(out, "xb") as file:
        np.savez(file, allow_pickle=False, **recorded)
    print(
        f"{out}: {len(prompts)} prompts, logits at {len(recorded['logits'])} positions, "
        f"{recorded['greedy'].size} greedy tokens, computed in {_DTYPE.value}"
    )


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
