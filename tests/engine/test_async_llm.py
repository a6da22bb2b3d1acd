"""`AsyncLLM` with a model of its own: what `LLM` gives, and a process that ends in its middle."""

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from pallas_paged.engine import LLM, SamplingParams
from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.engine.sampling_params import RequestOutputKind
from pallas_paged.models.demo import DEMO_MODEL
from tests.engine.async_serving import ask, assert_idle, run, threads_of

OPTIONS: dict[str, Any] = {
    "num_blocks": 200,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 512,
    "compilation_cache_dir": None,
    "background_compilation": False,
}
PARAMS = SamplingParams(temperature=0, max_tokens=12, output_kind=RequestOutputKind.DELTA)
PROMPTS = ["def main():", "class Stack:\n    ", "import os\n", "#" * 5000] * 3


def test_text_goes_in_and_out_as_with_an_llm() -> None:
    llm = LLM(DEMO_MODEL, **OPTIONS)
    outputs = llm.generate(PROMPTS[:4], PARAMS, use_tqdm=False)
    expected = [output.outputs[0].text for output in outputs] * 3

    async def text_of(llm: AsyncLLM, prompt: str) -> str:
        return "".join([o.outputs[0].text or "" async for o in llm.generate(prompt, PARAMS)])

    async def main() -> None:
        async with AsyncLLM(DEMO_MODEL, **OPTIONS) as llm:
            texts = await asyncio.gather(*(text_of(llm, prompt) for prompt in PROMPTS))
            assert texts == expected
            await ask(llm, ([5, 6], llm.get_default_sampling_params()))
            await assert_idle(llm)
        assert threads_of(llm).are_gone

    run(main())


@pytest.mark.slow
def test_a_process_ends_while_steps_run() -> None:
    program = PROGRAM.format(options=OPTIONS)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


PROGRAM = """
import asyncio, logging
from pallas_paged.engine import SamplingParams
from pallas_paged.engine.async_llm import AsyncLLM
from pallas_paged.models.demo import DEMO_MODEL

async def main():
    stream = await llm.submit("def", SamplingParams(max_tokens=500, ignore_eos=True))
    await anext(stream)
    print("done")

llm = AsyncLLM(DEMO_MODEL, **{options})
asyncio.run(main())
"""
