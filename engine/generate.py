"""Completes prompts from the command line.

  python -m pallas_paged.engine.generate --model=FOLDER --prompt='def main():'
  python -m pallas_paged.engine.generate --model=FOLDER --prompts_file=prompts.txt
  echo 'class Stack:' | python -m pallas_paged.engine.generate

One prompt is streamed as it is generated; several run as one batch and are printed in their order.
Standard input is one prompt, or one per line with --prompts_file=-. Without --model the demo model
that comes with the package runs. --noecho leaves the prompts out of what is printed.
"""

import io
import logging
import sys
import time
from typing import Any, BinaryIO

from absl import flags

from pallas_paged.engine import distributed_flags
from pallas_paged.engine.llm import LLM, Prompt
from pallas_paged.engine.outputs import RequestOutput
from pallas_paged.engine.sampling_params import SamplingParams
from pallas_paged.engine.valid_text import check_text
from pallas_paged.engine.watching_flags import watching_options
from pallas_paged.models import command_line, load_sampling_defaults
from pallas_paged.models.demo import DEMO_MODEL

_MODEL = flags.DEFINE_string(
    "model", str(DEMO_MODEL), "Folder with a Hugging Face checkpoint, or with a ported one."
)
_PROMPT = flags.DEFINE_multi_string("prompt", None, "A prompt; repeat the flag for several.")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    None,
    "File with a prompt per line, empty lines left out; - is standard input.",
)
_CHAT = flags.DEFINE_bool("chat", False, "Send each prompt through the model's chat template.")
_CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template",
    None,
    "With --chat: name of one of the folder's templates, or a Jinja template.",
)
# Without one of these, what the model's generation_config.json advises, if anything.
_TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "0 is greedy; by default the model's own in generation_config.json, or 1."
)
_TOP_P = flags.DEFINE_float(
    "top_p",
    None,
    "Smallest set of tokens with this much probability; by default the model's, or 1.",
)
_TOP_K = flags.DEFINE_integer(
    "top_k", None, "Most likely tokens to sample from, 0 for all; by default the model's, or 0."
)
_MIN_P = flags.DEFINE_float(
    "min_p", None, "Least probability, of the likeliest token's; by default the model's, or 0."
)
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty",
    None,
    "Makes tokens of prompt and output less likely above 1; by default the model's, or 1.",
)
_PRESENCE_PENALTY = flags.DEFINE_float(
    "presence_penalty", 0.0, "Taken from the logits of tokens that the output holds."
)
_FREQUENCY_PENALTY = flags.DEFINE_float(
    "frequency_penalty", 0.0, "Taken from them for each time that it holds them."
)
_BAD_WORD = flags.DEFINE_multi_string("bad_word", None, "Never generated; may be repeated.")
_MIN_TOKENS = flags.DEFINE_integer("min_tokens", 0, "Tokens before the completion may end.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Most tokens to generate per prompt.")
_STOP = flags.DEFINE_multi_string("stop", None, "Text that ends a completion; may be repeated.")
_SEED = flags.DEFINE_integer("seed", None, "Seed of the samples; without it every run differs.")
_ECHO = flags.DEFINE_bool("echo", True, "Print each prompt with its completion.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16", "float16"], "Type of weights and activations."
)
_MAX_MODEL_LEN = flags.DEFINE_integer("max_model_len", None, "Most tokens of prompt and output.")
_NUM_BLOCKS = flags.DEFINE_integer("num_blocks", None, "Size of the KV pool in blocks.")
_TENSOR_PARALLEL_SIZE = flags.DEFINE_integer(
    "tensor_parallel_size", None, "Devices that share the model; by default 1, or the bundle's."
)
_BUNDLE = flags.DEFINE_string(
    "bundle",
    None,
    "Folder that pallas_paged.engine.compile wrote for this model and machine. It is loaded with "
    "pickle, which runs whatever is in it: name none that you do not trust.",
)
_VERBOSE = flags.DEFINE_bool("verbose", False, "Log memory, compilation and implementation.")
flags.adopt_module_key_flags(distributed_flags)  # --help has them too


def main() -> None:
    """Completes the prompts of the flags, a file or standard input."""
    logging.getLogger("pallas_paged").setLevel(logging.INFO if _VERBOSE.value else logging.WARNING)
    if _CHAT_TEMPLATE.value is not None and not _CHAT.value:
        raise ValueError("--chat_template is for messages; add --chat")
    if distributed_flags.has_followed():
        return
    prompts = _read_prompts()
    given = {
        flag.name: flag.value
        for flag in (_TEMPERATURE, _TOP_P, _TOP_K, _MIN_P, _REPETITION_PENALTY)
        if flag.value is not None
    }
    sampling: dict[str, Any] = load_sampling_defaults(_MODEL.value) | given
    sampling.pop("max_tokens", None)  # a flag with a default of its own
    params = SamplingParams(
        **sampling,
        presence_penalty=_PRESENCE_PENALTY.value,
        frequency_penalty=_FREQUENCY_PENALTY.value,
        bad_words=_BAD_WORD.value,
        min_tokens=_MIN_TOKENS.value,
        max_tokens=_MAX_TOKENS.value,
        stop=_STOP.value,
        seed=_SEED.value,
    )
    llm = LLM(
        _MODEL.value,
        dtype=_DTYPE.value,
        max_model_len=_MAX_MODEL_LEN.value,
        num_blocks=_NUM_BLOCKS.value,
        bundle=_BUNDLE.value,
        seed=None,
        **watching_options(),
        **(
            {}
            if _TENSOR_PARALLEL_SIZE.value is None
            else {"tensor_parallel_size": _TENSOR_PARALLEL_SIZE.value}
        ),
    )
    llm.announce = lambda line: print(line, "...", file=sys.stderr, flush=True)
    inputs: list[Prompt] = (
        [
            llm.chat_prompt([{"role": "user", "content": prompt}], _CHAT_TEMPLATE.value)
            for prompt in prompts
        ]
        if _CHAT.value
        else list(prompts)
    )
    begin = time.perf_counter()
    outputs = _stream(llm, inputs[0], params) if len(inputs) == 1 else _batch(llm, inputs, params)
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    seconds = time.perf_counter() - begin
    print(
        f"{num_tokens} tokens in {seconds:.1f} s, compilation included: "
        f"{num_tokens / seconds:.1f} tokens/s",
        file=sys.stderr,
    )


def _stream(llm: LLM, prompt: Prompt, params: SamplingParams) -> list[RequestOutput]:
    """Prints the prompt, if it is echoed, and its completion as it grows."""
    shown = 0
    for index, output in enumerate(llm.stream(prompt, params)):
        if not index and isinstance(prompt, str) and _ECHO.value:
            print(prompt, end="")
        text = output.outputs[0].text or ""
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print()
    return [output]


def _batch(llm: LLM, prompts: list[Prompt], params: SamplingParams) -> list[RequestOutput]:
    """Prints each prompt and completion, in the order of the prompts."""
    outputs = llm.generate(prompts, params)
    for index, output in enumerate(outputs):
        label = f": {output.prompt!r}" if _ECHO.value else ""
        print(f"=== {index}{label}\n{output.outputs[0].text}")
    return outputs


def _read_prompts() -> list[str]:
    """Returns the prompts of the flags, or of standard input as one prompt."""
    if _PROMPT.value and _PROMPTS_FILE.value:
        raise ValueError("--prompt and --prompts_file are both given; choose one")
    if _PROMPT.value:
        for prompt in _PROMPT.value:
            check_text("--prompt", prompt)
        return _PROMPT.value
    if _PROMPTS_FILE.value:
        if _PROMPTS_FILE.value == "-":
            text = _read_standard_input()
        else:
            with open(_PROMPTS_FILE.value, "rb") as file:
                text = _read_text(file, f"--prompts_file={_PROMPTS_FILE.value}")
        lines = text.split("\n")
        prompts = [line for line in lines if line]
        if not prompts:
            raise ValueError(f"--prompts_file={_PROMPTS_FILE.value} holds no prompt")
        return prompts
    if sys.stdin is not None and sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt, --prompts_file or text on standard input")
    text = _read_standard_input()
    if not text:
        raise ValueError("standard input is empty; give it a prompt, or use --prompt")
    return [text]


def _read_standard_input() -> str:
    """Returns the rest of it; nothing where a parent process has closed it."""
    return "" if sys.stdin is None else _read_text(sys.stdin.buffer, "standard input")


def _read_text(file: BinaryIO, name: str) -> str:
    """Returns the rest of a file, its line ends as `\\n`."""
    try:
        text = file.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}; convert "
            "it first, with iconv for example"
        ) from error
    return io.StringIO(text, newline=None).read()


if __name__ == "__main__":
    command_line.run(main)
