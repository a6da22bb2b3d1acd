"""Records transformers' beam search over the small checkpoints and the demo model.

Run once, in an environment with torch and transformers, from the repository's root:

    python tests/engine/record_beam_search.py

Writes `data/beam-search-NAME.json`, a case per line: a prompt, the search's settings, the results
best first with their scores, and the least margin of all choices on the way, as a difference of
sums of log-probabilities. The ending tokens are those that turn up most in searches without any,
for a random model hardly ever says what its configuration calls the end.
"""

import collections
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[2]
MODELS = {
    "llama-gqa-llama3": ROOT / "tests/models/data/llama-gqa-llama3",
    "opt-prenorm": ROOT / "tests/models/data/opt-prenorm",
    "demo": ROOT / "models/demo",
}
PROMPT_LENGTHS = (5, 16, 33)
DEMO_PROMPTS = ("def __init__(self, ", "import os\n\n\nclass Stack:\n    def push(", "for i in ")
WIDTHS = (2, 4, 6, 16)
PENALTIES = (-1.0, 0.0, 1.0, 2.0)
EARLY_STOPPING = (False, True, "never")
MAX_TOKENS = 20
MIN_MARGIN = 1e-3


class Margins:
    """Watches a model's beam search and keeps the least margin of its choices."""

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.least = float("inf")
        for name in (
            "_get_top_k_continuations",
            "_update_finished_beams",
            "_check_early_stop_heuristic",
        ):
            setattr(model, name, self._watching(name, getattr(type(model), name), model))

    def _watching(self, name: str, method: Any, model: Any) -> Any:
        watch = getattr(self, "on" + name)
        is_static = name == "_check_early_stop_heuristic"

        def watched(**arguments: Any) -> Any:
            watch(**arguments)
            return method(**arguments) if is_static else method(model, **arguments)

        return watched

    def see(self, margin: float) -> None:
        self.least = min(self.least, abs(float(margin)))

    def weight(self, *lengths: float) -> float:
        """What makes a difference of scores one of sums."""
        return min(length ** self.settings["length_penalty"] for length in lengths)

    def on_get_top_k_continuations(self, **x: Any) -> None:
        width, sums = self.settings["width"], x["accumulated_log_probs"][0]
        vocab_size = len(sums) // width
        ending = torch.zeros(vocab_size, dtype=torch.bool)
        ending[list(self.settings["ending_ids"])] = True
        ending = ending.repeat(width)
        is_last = x["cur_len"] + 1 - x["decoder_prompt_len"] == self.settings["max_tokens"]
        best = sums.sort(descending=True).values
        near = (sums <= best[width - 1] + MIN_MARGIN) & (sums >= best[width] - MIN_MARGIN)
        if is_last or bool((near & ending).any()):
            self.see(best[width - 1] - best[width])
        if not is_last:
            best = sums[~ending].sort(descending=True).values
            self.see(best[width - 1] - best[width])

    def on_update_finished_beams(self, **x: Any) -> None:
        width, length = self.settings["width"], x["cur_len"] + 1 - x["decoder_prompt_len"]
        lengths = (x["beam_indices"][0] >= 0).sum(-1).tolist()
        self.ended = [
            (score, length)
            for score, length in zip(x["beam_scores"][0].tolist(), lengths, strict=True)
            if score > -1e8
        ]
        new = x["next_token_hits_stopping_criteria"][0] & x["top_num_beam_mask"]
        self.ended += [
            (total / length ** self.settings["length_penalty"], length)
            for total in x["topk_log_probs"][0][new].tolist()
        ]
        self.ended.sort(reverse=True)
        self._see_gaps(width - 1, width)
        del self.ended[width:]

    def on_check_early_stop_heuristic(self, **x: Any) -> None:
        if self.settings["early_stopping"] is True or not bool(x["is_sent_finished"].all()):
            return
        length = x["cur_len"] - x["decoder_prompt_len"]
        if length == self.settings["max_tokens"]:
            return
        if self.settings["early_stopping"] == "never" and self.settings["length_penalty"] > 0:
            length = self.settings["max_tokens"]
        best = x["running_beam_scores"][0, 0] / length ** self.settings["length_penalty"]
        worst, worst_length = self.ended[-1]
        self.see((best - worst) * self.weight(length, worst_length))

    def see_results(self) -> None:
        """Takes in the order of the results, and of the first one that is none."""
        self._see_gaps(0, self.settings["num_return"])

    def _see_gaps(self, first: int, last: int) -> None:
        for (a, a_length), (b, b_length) in itertools.pairwise(self.ended[first : last + 1]):
            self.see((a - b) * self.weight(a_length, b_length))


def generate(model: Any, prompt: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns a case."""
    margins = Margins(model, settings)
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        generation_config=transformers.GenerationConfig(
            do_sample=False,
            num_beams=settings["width"],
            num_return_sequences=settings["num_return"],
            length_penalty=settings["length_penalty"],
            early_stopping=settings["early_stopping"],
            max_new_tokens=settings["max_tokens"],
            eos_token_id=settings["ending_ids"] or None,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        ),
    )
    margins.see_results()
    lengths = (out.beam_indices >= 0).sum(-1).tolist()
    tokens = [
        row[len(prompt) : len(prompt) + length].tolist()
        for row, length in zip(out.sequences, lengths, strict=True)
    ]
    return {
        "prompt": prompt,
        **settings,
        "tokens": tokens,
        "scores": [round(score, 6) for score in out.sequences_scores.tolist()],
        "margin": round(margins.least, 7),
    }


def frequent_tokens(model: Any, prompt: list[int]) -> list[int]:
    """Returns what the best sequences hold behind their first tokens, most frequent first."""
    settings = {"width": 6, "num_return": 6, "length_penalty": 1.0, "early_stopping": False}
    found = generate(model, prompt, settings | {"max_tokens": 12, "ending_ids": []})
    counts = collections.Counter(token for tokens in found["tokens"] for token in tokens[2:])
    return [token for token, _ in counts.most_common()]


def cases(model: Any, prompts: list[list[int]], *, all_of_first: bool) -> Iterator[dict[str, Any]]:
    """Yields a model's cases: each combination of settings with one prompt, or also the first."""
    grid = list(itertools.product(WIDTHS, PENALTIES, EARLY_STOPPING))
    for index, prompt in enumerate(prompts):
        frequent = frequent_tokens(model, prompt)
        for number, (width, penalty, early) in enumerate(grid):
            if (number + number // 3) % 3 != index and not (all_of_first and index == 0):
                continue
            num_ending = (1, 1, 2, 3, 0)[number % 5]
            is_short = number // 3 % 4 == number // 12  # one penalty of each width
            yield generate(
                model,
                prompt,
                {
                    "width": width,
                    "num_return": (width, 1, 2)[(number // 3) % 3],
                    "length_penalty": penalty,
                    "early_stopping": early,
                    "max_tokens": 5 if is_short else MAX_TOKENS,
                    "ending_ids": frequent[:num_ending] if index else frequent[:1],
                },
            )


def make_prompts(name: str, model: Any, path: Path) -> list[list[int]]:
    if name == "demo":
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        return [tokenizer(text)["input_ids"] for text in DEMO_PROMPTS]
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(4, model.config.vocab_size, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]


def report(name: str, recorded: list[dict[str, Any]]) -> None:
    """Prints what the cases cover, and whether each setting makes a difference."""
    ended = sum(t[-1] in c["ending_ids"] for c in recorded for t in c["tokens"])
    total = sum(len(c["tokens"]) for c in recorded)
    close = sum(c["margin"] < MIN_MARGIN for c in recorded)
    print(
        f"{name}: {len(recorded)} cases, {ended} of {total} results end by a token, {close} with a "
        f"margin below {MIN_MARGIN}"
    )
    for setting in ("width", "length_penalty", "early_stopping"):
        groups: dict[str, list[str]] = collections.defaultdict(list)
        for case in recorded:
            same = ("prompt", "ending_ids", "max_tokens", "width", "length_penalty")
            same += ("early_stopping",)
            key = str([case[field] for field in same if field != setting])
            groups[key].append(str(case["tokens"][0]))
        groups = {key: results for key, results in groups.items() if len(results) > 1}
        differing = sum(len(set(results)) > 1 for results in groups.values())
        print(f"  the best result depends on {setting} in {differing} of {len(groups)} groups")


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(__file__).parent / "data"
    folder.mkdir(exist_ok=True)
    for name, path in MODELS.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.eval()
        model.generation_config = transformers.GenerationConfig()  # no ending tokens but our own
        prompts = make_prompts(name, model, path)
        recorded = list(cases(model, prompts, all_of_first=name == next(iter(MODELS))))
        lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in recorded)
        (folder / f"beam-search-{name}.json").write_text(f"[\n{lines}\n]\n")
        report(name, recorded)


if __name__ == "__main__":
    main()
