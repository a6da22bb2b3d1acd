"""What a stream holds for a reader that is slow, and outputs that become one."""

import asyncio
import dataclasses

import pytest

from pallas_paged.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from pallas_paged.engine.request_stream import RequestStream


def output_of(number: int, *completions: CompletionOutput, finished: bool = False) -> RequestOutput:
    return RequestOutput("a", None, (5,), completions, finished, RequestMetrics(number))


def delta(number: int, index: int = 0) -> CompletionOutput:
    return CompletionOutput(index, f"{number},", (number,))


def left(request_id: str) -> None:
    raise AssertionError(f"{request_id} was left")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 1000])
def test_deltas_that_nobody_reads_become_one_and_few_are_held(count: int) -> None:
    stream = RequestStream("a", is_delta=True, leave=left)
    for number in range(count):
        stream.put(output_of(number, delta(number), finished=number + 1 == count))
        assert len(stream._pending) <= count.bit_length()
    output = asyncio.run(anext(stream))  # type: ignore[arg-type]
    (completion,) = output.outputs
    assert completion.token_ids == tuple(range(count))
    assert completion.text == "".join(f"{number}," for number in range(count))
    assert (output.finished, output.metrics.arrival_time_s) == (True, count - 1)


def test_of_whole_outputs_the_latest_is_held() -> None:
    stream = RequestStream("a", is_delta=False, leave=left)
    for number in range(5):
        stream.put(output_of(number, delta(number), finished=number == 4))
        assert len(stream._pending) == 1
    assert asyncio.run(anext(stream)).metrics.arrival_time_s == 4  # type: ignore[arg-type]
    stream.close()  # it is over: nobody is told


def test_a_merged_delta_has_every_field() -> None:
    """All that is no delta is the later one's."""
    logprobs = ({3: Logprob(-1.0, 1)},)
    first = CompletionOutput(1, "a", (3,), -1.0, logprobs)
    second = CompletionOutput(1, "b", (4,), -2.0, logprobs, "stop", "b", 0.5)
    wanted = dataclasses.replace(second, text="ab", token_ids=(3, 4), logprobs=logprobs * 2)
    assert first.merged_with(second) == wanted
    prompt_logprobs = (None, {5: Logprob(-1.0, 1)})
    earlier = RequestOutput(
        "a", "x", (5, 5), (first,), False, RequestMetrics(0), 1, prompt_logprobs
    )
    later = RequestOutput("a", "x", (5, 5), (second,), True, RequestMetrics(2), 3)
    merged = dataclasses.replace(later, outputs=(wanted,), prompt_logprobs=prompt_logprobs)
    assert earlier.merged_with(later) == merged
    other = dataclasses.replace(later, outputs=(delta(7, index=0),))
    assert [one.index for one in earlier.merged_with(other).outputs] == [0, 1]
