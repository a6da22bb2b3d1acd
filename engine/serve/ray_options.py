"""From the arguments of a Ray Serve application to its options: what is wrong is said at once.

Arguments have the names of the flags of `python -m pallas_paged.engine.serve`, as far as they are
of the engine or of its answers, and of Ray Serve's options of a deployment. From a command line
they come as texts, from a file with their types.
"""

import contextlib
import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from pallas_paged.engine.async_llm import MAX_QUEUED_REQUESTS
from pallas_paged.engine.build import with_bundle
from pallas_paged.engine.config import EngineConfig
from pallas_paged.engine.device.device_memory import with_limits
from pallas_paged.models.demo import DEMO_MODEL

_SERVER: dict[str, Any] = {
    "served_model_name": list,
    "api_key": list,
    "allowed_origin": list,
    "chat_template": str,
    "tool_call_parser": str,
    "reasoning_parser": str,
    "metrics_prefix": str,
    "max_request_bytes": int,
    "body_timeout_s": float,
    "request_timeout_s": float,
    "stalled_client_s": float,
    "trust_request_chat_template": bool,
    "max_queued_requests": int,
    "log_requests": bool,
}
_DEPLOYMENT: dict[str, Any] = {
    "num_replicas": int | str,
    "autoscaling_config": dict,
    "ray_actor_options": dict,
    "max_ongoing_requests": int,
    "graceful_shutdown_timeout_s": float,
    "health_check_period_s": float,
    "health_check_timeout_s": float,
    "max_constructor_retry_count": int,
    "max_replicas_per_node": int,
    "request_router_config": dict,
}
_ABOVE_0 = ("max_request_bytes", "body_timeout_s", "request_timeout_s", "stalled_client_s")
_REFUSED = {
    "data_parallel_size": "Ray has the replicas; use num_replicas, or autoscaling_config",
    "host": "Ray listens; use http_options",
    "port": "Ray listens; use http_options",
    "shutdown_grace_s": "use graceful_shutdown_timeout_s",
    "step_log": "replicas on one machine would write to one file",
    "kv_events_replay_endpoint": "replicas on one machine would bind it twice",
}
_USUAL_MAX_NUM_SEQS = 256


@dataclasses.dataclass(frozen=True)
class RayOptions:
    """What an application is made of.

    Attributes:
      engine: arguments of `AsyncLLM`.
      server: arguments of `options_for`.
      log_requests: whether each request is a line of the replica's standard output.
      deployment: options of Ray Serve's deployment.
    """

    engine: dict[str, Any]
    server: dict[str, Any]
    log_requests: bool
    deployment: dict[str, Any]


def ray_options(args: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> RayOptions:
    """Returns the options that arguments make.

    A replica gets `tensor_parallel_size` GPUs. Where the environment says JAX_PLATFORMS=cpu it gets
    none, and the same environment. What `ray_actor_options` say of `num_gpus` and `runtime_env`
    goes before that.

    A replica may have twice as many requests as run at once (`max_num_seqs`), so that the next ones
    are there when some end, where Ray's own default is 5; scaling aims at as many as run.

    Raises:
      ValueError: one is not known, or its value is not usable; the message names it.
    """
    engine_types = typing.get_type_hints(EngineConfig)
    engine: dict[str, Any] = {}
    server: dict[str, Any] = {}
    deployment: dict[str, Any] = {}
    for name, value in args.items():
        if name in _REFUSED:
            raise ValueError(f"{name}={value!r} is nothing for Ray Serve: {_REFUSED[name]}")
        for known, found in ((engine_types, engine), (_SERVER, server), (_DEPLOYMENT, deployment)):
            if name in known:
                found[name] = typed(name, value, known[name])
                break
        else:
            names = ", ".join(sorted({*engine_types, *_SERVER, *_DEPLOYMENT} - {*_REFUSED}))
            raise ValueError(f"{name}={value!r} is not known; known are {names}")
    engine.setdefault("model", str(DEMO_MODEL))
    # Raises for what is wrong with it; what depends on the device is known where a replica runs.
    config = EngineConfig(**with_limits(with_bundle(engine), None))
    endpoint = config.kv_events_endpoint
    if endpoint is not None and (endpoint.startswith("ipc") or "*" in endpoint or "::" in endpoint):
        raise ValueError(
            f"kv_events_endpoint={endpoint!r} would be bound twice by replicas on one machine; "
            "name one to connect to"
        )
    for name in _ABOVE_0:
        if server.get(name) is not None and not server[name] > 0:
            raise ValueError(f"{name}={server[name]!r} must be above 0")
    logs = server.pop("log_requests", True)
    num_queued = server.pop("max_queued_requests", MAX_QUEUED_REQUESTS)
    if num_queued < 1:
        raise ValueError(f"max_queued_requests={num_queued} must be at least 1")
    max_num_seqs = engine.get("max_num_seqs") or _USUAL_MAX_NUM_SEQS
    defaults = {
        "max_ongoing_requests": 2 * max_num_seqs,
        "graceful_shutdown_timeout_s": 30.0,
        "health_check_period_s": 2.0,
        "max_constructor_retry_count": 3,
    }
    if deployment.get("num_replicas") == "auto" or "autoscaling_config" in deployment:
        deployment.setdefault("autoscaling_config", {})
        aim = {"target_ongoing_requests": max_num_seqs}
        deployment["autoscaling_config"] = aim | deployment["autoscaling_config"]
    actor: dict[str, Any] = {"num_gpus": config.tensor_parallel_size}
    if environment.get("JAX_PLATFORMS") == "cpu":
        actor = {"num_gpus": 0, "runtime_env": {"env_vars": {"JAX_PLATFORMS": "cpu"}}}
    deployment["ray_actor_options"] = _joined(actor, deployment.get("ray_actor_options", {}))
    return RayOptions(
        engine | {"max_queued_requests": num_queued},
        server,
        logs,
        defaults | deployment,
    )


def _joined(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Returns both; what is given wins, and dictionaries in them are joined too."""
    joined = defaults | given
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(given.get(name), dict):
            joined[name] = _joined(value, given[name])
    return joined


def typed(name: str, value: Any, kind: Any) -> Any:
    """Returns an argument with its type: a text that should be none is read as JSON.

    Args:
      name: the argument's.
      value: as it came.
      kind: a type, or a union of several.

    Raises:
      ValueError: it is of another type.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    plain = tuple(typing.get_origin(one) or one for one in kinds)
    if isinstance(value, str) and str not in plain and list not in plain:
        with contextlib.suppress(ValueError):  # of another type, which is said below
            value = json.loads(value)
    elif isinstance(value, str) and int in plain and value.isdecimal():
        value = int(value)
    elif isinstance(value, str) and list in plain:
        is_json = value.startswith("[") or value == "null"
        value = json.loads(value) if is_json else [value]
    elif value == "null" and types.NoneType in plain:
        value = None
    if isinstance(value, list) and tuple in plain:
        value = tuple(value)
    if float in plain and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    is_bool = isinstance(value, bool)
    if not isinstance(value, plain) or (is_bool and bool not in plain):
        wanted = " or ".join("null" if one is types.NoneType else one.__name__ for one in plain)
        raise ValueError(f"{name}={value!r} must be {wanted}")
    return value
