"""Records what lm_eval's `hf` model answers on the local tasks in `data/lm_eval/`.

Run once, in an environment with torch, transformers, accelerate and lm_eval, from the repository's
root:

    HF_HUB_OFFLINE=1 python -m tests.engine.record_lm_eval

Writes `data/lm_eval/reference.json`: of each case of `tests.engine.lm_eval_cases` the metrics, the
answers document by document, and the least margin of a completion's tokens, as a difference of
logits. And `data/lm_eval/characters/`, a tokenizer of single characters for small checkpoints.
"""

import json
from importlib.metadata import version
from typing import Any

import tokenizers
import torch
from lm_eval.models.huggingface import HFLM

from tests.engine.lm_eval_cases import CASES, DATA, MIN_MARGIN, REFERENCE, evaluate

SPECIAL = ("<|start|>", "<|pad|>", "<|end|>")
PAIRS = (
    *("ĠĠ", "in", "er", "re", "se", "lf", "de", "on", "at", "or", "al", "ue", "le", "th", "to"),
    *("es", "ed", "it", "ar", "st", "ti", "va", "of", "et", "if", "as", "_i", "):", "()"),
)


class WatchedHFLM(HFLM):
    """Keeps the least margin of each completion, in the order of the requests."""

    def __init__(self, **options: Any) -> None:
        super().__init__(device="cpu", batch_size=1, **options)
        self.least_margins: list[float] = []

    def _model_generate(self, **settings: Any) -> Any:
        settings |= {"return_dict_in_generate": True, "output_logits": True}
        out = super()._model_generate(**settings)
        top = torch.stack(out.logits)[:, 0].topk(2).values
        self.least_margins.append(float((top[:, 0] - top[:, 1]).min()))
        return out.sequences

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Completes them one by one: it would choose an order of its own."""
        return [super(WatchedHFLM, self).generate_until([one], True)[0] for one in requests]


def make_tokenizer() -> None:
    """Writes the tokenizer: no BOS, 128 tokens, all ASCII."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = [*SPECIAL, *letters, *PAIRS]
    assert len(tokens) == len(set(tokens)) == 128
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [(pair[0], pair[1]) for pair in PAIRS])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    folder = DATA / "characters"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n")
    fields = {"eos_token": SPECIAL[2], "pad_token": SPECIAL[1], "model_max_length": 128}
    fields |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def rounded(value: Any) -> Any:
    """Returns the same with numbers of nine digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def main() -> None:
    torch.set_num_threads(1)
    make_tokenizer()
    lines = []
    for name, case in CASES.items():
        model = WatchedHFLM(**case.model_args)
        answers = evaluate(case, model)
        close = sum(margin < MIN_MARGIN for margin in model.least_margins)
        print(f"{name}: {answers.metrics}, {close} completions with a margin below {MIN_MARGIN}")
        recorded = {**answers._asdict(), "margins": model.least_margins}
        lines.append(f'"{name}": {json.dumps(rounded(recorded))}')
    versions = {each: version(each) for each in ("lm_eval", "transformers", "torch")}
    cases = ",\n".join(lines)
    REFERENCE.write_text(f'{{"versions": {json.dumps(versions)}, "cases": {{\n{cases}\n}}}}\n')


if __name__ == "__main__":
    main()
