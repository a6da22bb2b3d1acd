"""PyTorch and Triton beside us, as far as that can be said where neither is installed."""

import functools
import importlib.util
import math
import pathlib

import numpy as np
import pytest

from benchmarks.gpu_suite import shapes, torch_peer, triton_paged
from benchmarks.gpu_suite import stage as stages
from benchmarks.gpu_suite.stage import Context, run_case


@pytest.fixture
def context(tmp_path: pathlib.Path) -> Context:
    return Context("cpu", tmp_path, tmp_path)


@pytest.fixture
def fake_torch(monkeypatch):
    """Peers of which `name` takes so many microseconds and is so wrong, of those in the dict."""

    def use(peers: dict[str, dict[str, tuple[float, float]]]) -> None:
        def make(name, setting):
            if name not in peers:
                raise NotImplementedError("not for this shape")
            return peers[name]

        names = ("sdpa", "triton_paged")
        monkeypatch.setattr(
            torch_peer, "PEERS", {name: functools.partial(make, name) for name in names}
        )
        monkeypatch.setattr(torch_peer, "Peer", tuple)
        monkeypatch.setattr(torch_peer, "_torch", lambda context: np)  # it has a version too
        monkeypatch.setattr(torch_peer, "relative_error", lambda torch, shape, peer: peer[1])
        monkeypatch.setattr(torch_peer, "graph_us", lambda torch, work, calls: work.args[0][0])

    return use


def test_torch_is_compared_with_what_earlier_stages_measured(context, fake_torch):
    context = context._replace(platform="sm_90")
    fake_torch({"sdpa": {"": (10.0, 0.003)}})
    cases = {case.name: case for case in torch_peer.STAGE.cases(context)}
    for stage, shape, us in (
        ("decode", shapes.DECODE_AIMS[0], 2.0),
        ("prefill", shapes.PREFILL_AIMS[0], 5.0),
    ):
        stages.append(context.results, stage, {"case": shape.name, "status": "ok", "us": us})
        row = cases[shape.name].run(context)
        assert (row["sdpa_us"], row["sdpa_error"], row["sdpa/ours"]) == (10.0, 0.003, 10.0 / us)
        assert row["triton_paged_us"] is None
        assert row["triton_paged_reason"] == "unsupported: not for this shape"
    assert "sdpa/ours" not in cases[shapes.DECODE_AIMS[1].name].run(context)


def test_the_fastest_variant_of_a_peer_counts(context, fake_torch):
    fake_torch({"triton_paged": {"a": (3.0, 0.001), "b": (2.0, 0.002), "c": (4.0, 0.003)}})
    row = torch_peer.run(shapes.DECODE_AIMS[0], context._replace(platform="sm_90"))
    assert (row["triton_paged_us"], row["triton_paged_variant"]) == (2.0, "b")
    assert row["triton_paged_error"] == 0.003


@pytest.mark.parametrize("error", [0.02, math.nan])
def test_a_wrong_peer_has_no_time(error, context, fake_torch):
    fake_torch({"sdpa": {"": (1.0, 0.0)}, "triton_paged": {"a": (3.0, 0.001), "b": (2.0, error)}})
    row = torch_peer.run(shapes.DECODE_AIMS[0], context._replace(platform="sm_90"))
    assert row["sdpa_us"] == 1.0
    assert row["triton_paged_us"] is None
    assert row["triton_paged_reason"].startswith("wrong: ")
    assert str(row["triton_paged_error"]) == str(error)


def test_torch_is_timed_at_sizes_at_which_we_are():
    ours = {shape.name for shape in (*shapes.decode_shapes(), *shapes.prefill_shapes())}
    assert {shape.name for shape in torch_peer.SHAPES} <= ours
    assert set(shapes.DECODE_AIMS) <= set(torch_peer.SHAPES)
    for shape in torch_peer.SHAPES:
        layers, turns = torch_peer.layers_and_turns(shape)
        assert layers * shape.kv_bytes >= 2 * torch_peer.L2_BYTES
        assert layers * turns <= torch_peer.MAX_GRAPH_CALLS


def test_sequences_are_split_until_each_sm_has_two_programs():
    splits = functools.partial(triton_paged.num_splits, tile=64, num_sms=132)
    assert splits(8, 32768) == 33  # 264 programs
    assert splits(64, 1024) == 4
    assert splits(512, 4096) == 1
    assert splits(8, 100) == 2  # no piece is smaller than a tile
    assert splits(8, 1) == 1


def test_without_torch_peers_are_unsupported(context, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for case in torch_peer.STAGE.cases(context):
        row = run_case(case, context)
        assert (row["status"], row["reason"]) == ("unsupported", "torch is not installed")
