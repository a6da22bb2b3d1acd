"""Every field of `SamplingParams`: its default, its range, its way of refusing."""

import dataclasses
import math
import pickle

import numpy as np
import pytest

from pallas_paged.engine.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": None,
    "stop_token_ids": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "structured_outputs": None,
    "skip_reading_prefix_cache": False,
    "skip_writing_prefix_cache": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
}

NAN, INF = math.nan, math.inf

REFUSED: list[tuple[str, object, str]] = [
    *(("n", value, "from 1 to 16384") for value in (0, -1, 16385, True, 1.0, "1", None, NAN)),
    *((f"{kind}_penalty", value, r"in \[-2, 2\]; use 0 for none")
      for kind in ("presence", "frequency") for value in (-2.1, 2.1, NAN, INF, True, "0", None)),
    *(("repetition_penalty", value, "> 0; use 1") for value in (0, -1, NAN, INF, True, "1", None)),
    *(("temperature", value, ">= 0; use 0") for value in (-0.1, NAN, INF, -INF, True, "1", None)),
    *(("temperature", value, "a finite number") for value in (1e39, 10**400, 1j)),
    *(("top_p", value, r"in \(0, 1\]; use 1") for value in (0, -0.1, 1.1, NAN, INF, True, "1")),
    *(("top_k", value, "from -1 to 2147483647; use 0 or -1")
      for value in (-2, 2**31, True, 5.0, "5", None, NAN)),
    *(("min_p", value, r"in \[0, 1\]; use 0") for value in (-0.1, 1.1, NAN, INF, False, "0", None)),
    *(("seed", value, "or None; use None") for value in (-2, 2**64, True, 1.5, "1", NAN)),
    *(("stop", value, "a string, a list of strings or None")
      for value in (5, b"x", [5], ["a", None], {"a": 1}, {"a"}, True)),
    *(("stop", value, "none of them empty; leave '' out") for value in ("", [""], ["a", ""])),
    *(("stop_token_ids", value, "a list of token ids or None") for value in (5, "5", {5}, NAN)),
    *(("stop_token_ids", value, "is not an id >= 0")
      for value in ([-1], [1, "2"], [True], [1.0], [None])),
    *((field, value, "True or False")
      for field in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")
      for value in (0, 1, None, "yes", np.True_)),
    *(("max_tokens", value, "or None; use None") for value in (0, -1, True, 16.0, "16", NAN)),
    *(("min_tokens", value, ">= 0; use 0") for value in (-1, True, 1.0, None)),
    *((field, value, "or None; use None for none")
      for field in ("logprobs", "prompt_logprobs") for value in (-2, True, 1.0, "all")),
    *(("logit_bias", value, "of token ids") for value in ([(1, 2)], 5, {-1: 0}, {"1": 0})),
    *(("logit_bias", value, "a mapping to numbers") for value in ({1: NAN}, {1: "x"}, {1: True})),
    *(("allowed_token_ids", value, "token id") for value in (5, [], [-1], ["a"])),
    *(("bad_words", value, "a list of strings") for value in ("word", [""], [5])),
    *(("output_kind", value, "a RequestOutputKind, such") for value in (1, "DELTA", None)),
]  # fmt: skip

ACCEPTED: list[tuple[str, object, object]] = [
    ("n", np.int64(1), 1),
    ("temperature", 0, 0.0),
    ("temperature", 1e-6, 1e-6),
    ("temperature", np.float32(0.5), 0.5),
    ("top_p", 1, 1.0),
    ("top_p", 1e-9, 1e-9),
    ("top_k", -1, 0),
    ("top_k", 10**9, 10**9),
    ("min_p", 1, 1.0),
    ("seed", 0, 0),
    ("seed", -1, None),
    ("seed", 2**64 - 1, 2**64 - 1),
    ("stop", None, ()),
    ("stop", [], ()),
    ("stop", "\n", ("\n",)),
    ("stop", ["a", "b"], ("a", "b")),
    ("stop_token_ids", None, ()),
    ("stop_token_ids", (np.int32(2), 3), (2, 3)),
    ("max_tokens", None, None),
    ("max_tokens", 1, 1),
    ("logit_bias", {}, None),
    ("logit_bias", {1: 10**400, 2: -INF}, {1: 100.0, 2: -100.0}),
    ("bad_words", [], None),
    ("output_kind", RequestOutputKind(1), RequestOutputKind.DELTA),  # the number is vLLM's
    ("output_kind", RequestOutputKind(2), RequestOutputKind.FINAL_ONLY),
]


def test_names_and_defaults():
    assert {f.name: f.default for f in dataclasses.fields(SamplingParams)} == DEFAULTS


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_refused(field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        SamplingParams(**{field: value})
    assert str(error.value).startswith(f"{field}={value!r} must be ")


@pytest.mark.parametrize("field", ["stop", "bad_words"])
def test_half_of_a_surrogate_pair_is_refused(field):
    with pytest.raises(ValueError, match=rf"{field}=.* holds .*ud800' at character 1, half of a"):
        SamplingParams(**{field: ["fine", "a\ud800"]})


def test_early_stopping_of_the_wrong_type_is_refused():
    with pytest.raises(ValueError, match=r"early_stopping=array.* must be False, True or"):
        BeamSearchParams(beam_width=2, max_tokens=3, early_stopping=np.zeros(2))


@pytest.mark.parametrize(("field", "value", "held"), ACCEPTED)
def test_accepted_and_held_in_one_form(field, value, held):
    result = getattr(SamplingParams(**{field: value}), field)
    assert result == held
    assert type(result) is type(held)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 2, "temperature": 0}, "n=2 with temperature=0.0 .* use n=1, or a temperature"),
        ({"min_tokens": 17}, "min_tokens=17 must be at most max_tokens=16"),
        ({"stop": "x", "detokenize": False}, r"stop=\('x',\) needs the text.*stop_token_ids"),
    ],
)
def test_fields_that_exclude_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_min_tokens_is_compared_only_with_a_limit():
    assert SamplingParams(min_tokens=100, max_tokens=None).min_tokens == 100


def test_frozen_equal_and_copied():
    params = SamplingParams(stop=["a"], stop_token_ids=[1], seed=3)
    assert params == SamplingParams(stop="a", stop_token_ids=(1,), seed=3)
    assert dataclasses.replace(params, top_k=-1) == params
    assert pickle.loads(pickle.dumps(params)) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 4
