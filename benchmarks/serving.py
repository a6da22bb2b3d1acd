"""Measures servers with OpenAI's API: latencies and throughput at given rates of requests.

  python -m benchmarks.serving --tokenizer=FOLDER --request_rate=4 --goodput=ttft:500,tpot:50
  python -m benchmarks.serving --tokenizer=FOLDER --dataset=ShareGPT.json --request_rate=1,2,4,8 \\
      --num_prompts=500 --plot=latencies.png --json=figures.json
  python -m benchmarks.serving --base_url=http://127.0.0.1:8000 --label=ours \\
      --base_url=http://127.0.0.1:8001 --label=theirs --prompts=tokens --vocab_size=32000 \\
      --prompt_len=512 --output_len=128 --ignore_eos --request_rate=2,8,inf --rounds=3

Any server will do that streams completions and, as stream_options.include_usage asks it to, says
how many tokens they have. All token counts of the figures are the server's.

A chunk of a stream may hold several tokens. TTFT is the time to the first chunk with text, E2EL to
the last one, ITL every gap between two chunks, whatever they hold; TPOT is (E2EL - TTFT) divided by
the tokens that the server counts, less one. A request's clock starts when it is due. With
--max_concurrency a request that waits for a place is due when it gets one.

The client is one process and measures itself: how much later than due it sent requests, and which
part of a core it took. It warns when that may have changed the figures.

With several rates the runs are a sweep. With several servers they take turns at each rate, with the
same requests, in every other round in the opposite order; ratios are taken within rounds. Prompts
are other ones in each run, so that none is in a prefix cache; "of them cached by the server" says
if some were. Ends with status 1 if all requests of a run, or of a warm-up, fail.
"""

import asyncio
import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from benchmarks import metrics, pictures, workloads
from benchmarks.serving_client import experiment, load, prompts, report, servers
from benchmarks.serving_client.experiment import Place, Run, Settings
from benchmarks.serving_client.load import Outgoing
from benchmarks.serving_client.servers import Server
from benchmarks.workloads import Request, Workload
from pallas_paged.engine.text.tokenizer import Tokenizer, load_tokenizer, require_tokenizer
from pallas_paged.models import command_line

if TYPE_CHECKING:
    from aiohttp import ClientSession

_BASE_URL = flags.DEFINE_multi_string(
    "base_url", ["http://127.0.0.1:8000"], "A server; given several times, servers to compare."
)
_LABEL = flags.DEFINE_multi_string(
    "label", [], "What tables call a server; as often as --base_url. Without: host and port."
)
_ENDPOINT = flags.DEFINE_enum(
    "endpoint", prompts.COMPLETIONS, [prompts.COMPLETIONS, prompts.CHAT], "Where requests are sent."
)
_MODEL = flags.DEFINE_string("model", None, "Its name; without: each server's first one.")
_API_KEY = flags.DEFINE_string(
    "api_key", None, "What servers want to be shown; without: OPENAI_API_KEY of the environment."
)
_PROMPTS = flags.DEFINE_enum(
    "prompts", "text", ["text", "tokens"], "What is sent: texts, or token ids (not to a chat)."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "Folder of the model's tokenizer. Drawn token ids are all that can do without, see "
    "--vocab_size.",
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size",
    None,
    "Instead of --tokenizer, for --prompts=tokens: token ids to draw from.",
    lower_bound=1,
)
_DATASET = flags.DEFINE_string("dataset", None, "ShareGPT or Alpaca JSON file, as published.")
_LENGTHS = flags.DEFINE_enum(
    "lengths",
    "sharegpt",
    list(workloads.LENGTHS),
    "Without --dataset: random prompts, lengths from a mixture with the means of this set.",
)
_LENGTH_SCALE = flags.DEFINE_float("length_scale", 1.0, "Factor of the drawn lengths.")
_PROMPT_LEN = flags.DEFINE_integer(
    "prompt_len",
    None,
    "Random prompts that all have this length; with --output_len.",
    lower_bound=1,
)
_OUTPUT_LEN = flags.DEFINE_integer(
    "output_len", None, "Outputs that all have this length; with --prompt_len.", lower_bound=1
)
_MAX_MODEL_LEN = flags.DEFINE_integer(
    "max_model_len", None, "Most tokens of a request; without: what the servers say."
)
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 100, "Requests of a run.", lower_bound=1)
_SAME_PROMPTS = flags.DEFINE_boolean(
    "same_prompts", False, "Send the same prompts in all runs: servers may have them cached."
)
_REQUEST_RATE = flags.DEFINE_list(
    "request_rate", ["inf"], "Requests per second, one run for each; inf: all at once."
)
_BURSTINESS = flags.DEFINE_float(
    "burstiness", 1.0, "Shape of the gamma distributed gaps: 1 Poisson, below 1 bursts."
)
_MAX_CONCURRENCY = flags.DEFINE_integer(
    "max_concurrency", None, "Most requests on their way at once; others wait.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 1, "Times that each rate is measured; tables show medians.", lower_bound=1
)
_WARMUP_REQUESTS = flags.DEFINE_integer(
    "warmup_requests", 2, "Sent to each server first, and not measured.", lower_bound=0
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of workload and arrivals.", lower_bound=0)
_IGNORE_EOS = flags.DEFINE_boolean(
    "ignore_eos", False, "Ask for outputs of full length, which is no field of OpenAI's."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of all requests.", lower_bound=0)
_GOODPUT = flags.DEFINE_list(
    "goodput", [], "Limits in ms, such as ttft:500,tpot:50,e2el:9000, that good requests keep."
)
_TIMEOUT_S = flags.DEFINE_float(
    "timeout_s", 600.0, "A request that takes longer has failed.", lower_bound=0.001
)
_READY_TIMEOUT_S = flags.DEFINE_float(
    "ready_timeout_s", 60.0, "How long to wait for each server's /health.", lower_bound=0
)
_JSON = flags.DEFINE_string(
    "json", None, "Also write the figures to this file: an object, or of several runs a list."
)
_PLOT = flags.DEFINE_string("plot", None, "Also draw latencies against request rates (PNG).")


def check_flags() -> None:
    """Refuses flags that do not go together.

    Raises:
      ValueError: some do not.
    """
    is_fixed = _PROMPT_LEN.value is not None
    if is_fixed != (_OUTPUT_LEN.value is not None):
        raise ValueError("--prompt_len and --output_len go together; give both or neither")
    if is_fixed and _DATASET.value is not None:
        raise ValueError(
            "--dataset has lengths of its own; leave --prompt_len and --output_len out"
        )
    is_text = _PROMPTS.value == "text"
    if not is_text and _ENDPOINT.value == prompts.CHAT:
        raise ValueError(f"--prompts=tokens cannot be sent to {prompts.CHAT}, which takes texts")
    has_vocab, has_tokenizer = _VOCAB_SIZE.value is not None, _TOKENIZER.value is not None
    if has_vocab and (is_text or _DATASET.value is not None or has_tokenizer):
        raise ValueError(
            "--vocab_size is for drawn token ids: --prompts=tokens, without --dataset or "
            "--tokenizer"
        )
    if not has_vocab and not has_tokenizer:
        raise ValueError(
            "prompts need a tokenizer: --tokenizer=FOLDER with the model's; or random token ids "
            "with --prompts=tokens --vocab_size=N"
        )


def make_supply(found: list[Server], tokenizer: Tokenizer | None, num_runs: int) -> prompts.Supply:
    """Returns the flags' requests for so many runs, and prints where they come from."""
    count, seed, is_same = _NUM_PROMPTS.value, _SEED.value, _SAME_PROMPTS.value
    longest = longest_request(found)
    vocab_size = None
    if tokenizer is not None and _DATASET.value is not None:
        workload = workloads.load(
            _DATASET.value,
            count if is_same else count * num_runs + _WARMUP_REQUESTS.value,
            encode=tokenizer.encode,
            max_model_len=longest,
            seed=seed,
        )
    else:
        vocab_size = _VOCAB_SIZE.value if tokenizer is None else tokenizer.vocab_size
        workload = draw(longest, vocab_size or 0)
    describe(workload)
    return prompts.Supply(workload.requests, count, vocab_size, is_same, seed)


def draw(longest: int, vocab_size: int) -> Workload:
    """Returns one run's requests, of random tokens.

    Raises:
      ValueError: the flags' lengths are more than the `longest` request may have.
    """
    count, seed = _NUM_PROMPTS.value, _SEED.value
    prompt_len, output_len = _PROMPT_LEN.value, _OUTPUT_LEN.value
    if prompt_len is None or output_len is None:
        return workloads.draw(
            _LENGTHS.value,
            count,
            scale=workloads.check_scale(_LENGTH_SCALE.value),
            max_model_len=longest,
            vocab_size=vocab_size,
            seed=seed,
        )
    if prompt_len + output_len > longest:
        raise ValueError(
            f"prompt_len={prompt_len} and output_len={output_len} are more than the {longest} "
            "tokens that a request may have here; make them shorter"
        )
    return workloads.draw_equal(count, prompt_len, output_len, vocab_size=vocab_size, seed=seed)


def longest_request(found: list[Server]) -> int:
    """Returns how many tokens a workload's requests may have, for all servers.

    Raises:
      ValueError: no server and no flag says so, or hardly any.
    """
    known = [server.max_model_len for server in found if server.max_model_len is not None]
    longest = _MAX_MODEL_LEN.value or min(known, default=None)
    if longest is None:
        raise ValueError("no server says how long requests may be: give --max_model_len")
    room = prompts.ROOM["tokens" if _PROMPTS.value == "tokens" else _ENDPOINT.value]
    if longest < room + 2:
        raise ValueError(
            f"max_model_len={longest} must be {room + 2} or more: servers may add {room} tokens to "
            "a prompt"
        )
    return longest - room


def describe(workload: Workload) -> None:
    """Prints what is sent."""
    prompt, output = workload.mean_lengths
    ends = "EOS ignored" if _IGNORE_EOS.value else "up to EOS"
    print(
        f"workload: {_NUM_PROMPTS.value} requests a run, {workload.source}\n"
        f"mean tokens: prompt {prompt:.2f}, output at most {output:.2f}; temperature "
        f"{_TEMPERATURE.value:g}, {ends}; burstiness {_BURSTINESS.value:g}",
        flush=True,
    )


def make_outgoing(
    requests: list[Request], server: Server, tokenizer: Tokenizer | None
) -> list[Outgoing]:
    """Returns requests as they are sent to a server."""
    options: dict[str, Any] = {"temperature": _TEMPERATURE.value}
    if _IGNORE_EOS.value:
        options["ignore_eos"] = True
    found = []
    for token_ids, num_output_tokens in requests:
        prompt: str | tuple[int, ...] = token_ids
        if _PROMPTS.value == "text" and tokenizer is not None:
            prompt = prompts.text_of(token_ids, tokenizer)
        endpoint, model = _ENDPOINT.value, server.model
        found.append(
            prompts.outgoing(
                prompt, num_output_tokens, endpoint=endpoint, model=model, options=options
            )
        )
    return found


async def find_servers(session: "ClientSession", given: list[Server]) -> list[Server]:
    """Returns the servers, ready, with their models."""
    found = []
    for server in given:
        print(f"waiting for {server.base_url}/health", file=sys.stderr, flush=True)
        await servers.wait_until_ready(session, server.base_url, _READY_TIMEOUT_S.value)
        found.append(await servers.with_model(session, server, _MODEL.value))
        print(f"{server.label}: {found[-1].model} at {server.base_url}{_ENDPOINT.value}")
    return found


async def measure_all(
    given: list[Server], settings: Settings, places: list[Place], tokenizer: Tokenizer | None
) -> list[Run]:
    """Returns all runs, each of which is also printed and written when it has ended."""
    api_key = _API_KEY.value or os.environ.get("OPENAI_API_KEY")
    async with load.open_session(api_key, _TIMEOUT_S.value) as session:
        found = await find_servers(session, given)
        rates = list(dict.fromkeys(place.rate for place in places))
        supply = make_supply(found, tokenizer, len(rates) * _ROUNDS.value)
        for server in found if _WARMUP_REQUESTS.value else []:
            first = make_outgoing(supply.of_warm_up(_WARMUP_REQUESTS.value), server, tokenizer)
            problem = await experiment.warm_up(session, server, _ENDPOINT.value, first)
            if problem is not None:
                print(f"{server.label}: all warm-up requests failed: {problem}", file=sys.stderr)
                sys.exit(1)
        runs: list[Run] = []
        reports: list[dict[str, Any]] = []
        for place in places:
            requests = supply.of_run(place.round * len(rates) + rates.index(place.rate))
            outgoing = make_outgoing(requests, found[place.server], tokenizer)
            run = await experiment.measure(session, found[place.server], place, outgoing, settings)
            print(report.line_of(run), flush=True)
            runs.append(run)
            reports.append(experiment.report_of(run, settings, num_prompts=len(requests)))
            if _JSON.value:
                text = json.dumps(reports[0] if len(places) == 1 else reports, indent=1)
                pathlib.Path(_JSON.value).write_text(text, encoding="utf-8")
    return runs


def main() -> None:
    """Prints a line per run, and a table; see `report.render`."""
    settings = Settings(
        _ENDPOINT.value,
        _BURSTINESS.value,
        _MAX_CONCURRENCY.value,
        _SEED.value,
        metrics.parse_limits(_GOODPUT.value),
        _IGNORE_EOS.value,
    )
    check_flags()
    given = servers.parse(_BASE_URL.value, _LABEL.value)
    rates = experiment.parse_rates(_REQUEST_RATE.value, _BURSTINESS.value)
    figure = None
    if _PLOT.value:
        if rates == [float("inf")]:
            raise ValueError("--plot draws latencies against finite rates: give --request_rate")
        figure = pictures.new_figure(10, 8)
        pictures.save(figure, _PLOT.value)  # refused now, not after all runs
    load.allow_connections()
    tokenizer = None
    if _TOKENIZER.value is not None:
        tokenizer = require_tokenizer(load_tokenizer(_TOKENIZER.value), _TOKENIZER.value)
    places = experiment.places(len(given), rates, _ROUNDS.value)
    runs = asyncio.run(measure_all(given, settings, places, tokenizer))
    print("\n" + report.render(runs))
    if figure is not None and _PLOT.value:
        report.draw(figure, runs)
        pictures.save(figure, _PLOT.value)
    if any(not run.figures["completed"] for run in runs):
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
