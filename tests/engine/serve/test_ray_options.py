"""Arguments of a Ray Serve application, which are texts or values: all are used, or refused."""

from typing import Any

import pytest

from pallas_paged.engine.serve.ray_options import ray_options
from pallas_paged.models.demo import DEMO_MODEL


def test_texts_of_a_command_line_are_what_a_file_says() -> None:
    texts = {
        "model": "123",
        "max_num_seqs": "8",
        "num_blocks": "null",
        "swap_space": "2",
        "deterministic": "false",
        "profile_steps": "[2, 4]",
        "profile_dir": "traces",
        "speculative_config": '{"method": "ngram", "num_speculative_tokens": 3}',
        "served_model_name": "mine",
        "request_timeout_s": "5",
        "log_requests": "false",
        "num_replicas": "3",
        "ray_actor_options": '{"num_cpus": 2}',
    }

    values: dict[str, Any] = {
        "model": "123",
        "max_num_seqs": 8,
        "num_blocks": None,
        "swap_space": 2.0,
        "deterministic": False,
        "profile_steps": [2, 4],
        "profile_dir": "traces",
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
        "served_model_name": ["mine"],
        "request_timeout_s": 5,
        "log_requests": False,
        "num_replicas": 3,
        "ray_actor_options": {"num_cpus": 2},
    }
    found = ray_options(texts, {})
    assert found == ray_options(values, {})
    engine = {name: values[name] for name in list(values)[:8]}
    assert found.engine == engine | {"profile_steps": (2, 4), "max_queued_requests": 1024}
    assert found.server == {"served_model_name": ["mine"], "request_timeout_s": 5.0}
    assert not found.log_requests
    assert found.deployment == {
        "num_replicas": 3,
        "ray_actor_options": {"num_cpus": 2, "num_gpus": 1},
        "max_ongoing_requests": 16,
        "graceful_shutdown_timeout_s": 30.0,
        "health_check_period_s": 2.0,
        "max_constructor_retry_count": 3,
    }


def test_a_replica_gets_the_gpus_that_it_needs_and_on_a_cpu_none() -> None:
    def actor(environment: dict[str, str], **args: Any) -> Any:
        return ray_options(args, environment).deployment["ray_actor_options"]

    cpu = {"JAX_PLATFORMS": "cpu"}
    assert actor({}) == {"num_gpus": 1}
    assert actor(cpu) == {"num_gpus": 0, "runtime_env": {"env_vars": cpu}}
    assert actor({}, ray_actor_options='{"num_gpus": 0.5}') == {"num_gpus": 0.5}


def test_scaling_aims_at_as_many_requests_as_run() -> None:
    nothing = ray_options({})
    assert nothing.engine["model"] == str(DEMO_MODEL)
    assert "autoscaling_config" not in nothing.deployment
    bounds = {"min_replicas": 1, "max_replicas": 4}
    found = ray_options({"autoscaling_config": bounds, "max_num_seqs": 32}).deployment
    assert found["autoscaling_config"] == bounds | {"target_ongoing_requests": 32}
    assert found["max_ongoing_requests"] == 64
    asked = {"target_ongoing_requests": 5}
    found = ray_options({"autoscaling_config": asked, "num_replicas": "auto"}).deployment
    assert (found["autoscaling_config"], found["num_replicas"]) == (asked, "auto")
    assert ray_options({"max_ongoing_requests": "7"}).deployment["max_ongoing_requests"] == 7


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"num_blockz": "3"}, "num_blockz='3' is not known; known are .*num_blocks"),
        ({"max_num_seqs": "many"}, "max_num_seqs='many' must be int"),
        ({"max_num_seqs": "8.5"}, "max_num_seqs=8.5 must be int"),
        ({"max_num_seqs": "true"}, "max_num_seqs=True must be int"),
        ({"deterministic": "1"}, "deterministic=1 must be bool"),
        ({"model": 3}, "model=3 must be str"),
        ({"speculative_config": "[1]"}, r"speculative_config=\[1\] must be dict or null"),
        ({"autoscaling_config": "4"}, "autoscaling_config=4 must be dict"),
        ({"block_size": 0}, "block_size=0 must be"),
        ({"request_timeout_s": 0}, "request_timeout_s=0.0 must be above 0"),
        ({"max_queued_requests": "0"}, "max_queued_requests=0 must be at least 1"),
        ({"data_parallel_size": 2}, "data_parallel_size=2 is nothing for Ray Serve.*num_replicas"),
        ({"port": "80"}, "port='80' is nothing for Ray Serve"),
        ({"kv_events_endpoint": "tcp://*:5557"}, "would be bound twice"),
    ],
)
def test_what_is_wrong_is_said_by_name(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ray_options(args)


def test_events_may_go_to_who_waits_for_them() -> None:
    endpoint = "tcp://router:5557"
    assert ray_options({"kv_events_endpoint": endpoint}).engine["kv_events_endpoint"] == endpoint
