"""From a model folder to a model: configuration and weights.

A folder is a Hugging Face one, with `config.json` and safetensors files, or one that
`pallas_paged.models.port` made of it. Strict: what is missing, left over or does not fit is an
error that names it.
"""

import collections
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_paged.models.checkpoint import Checkpoint, HFCheckpoint, Tensor, model_file, read_json
from pallas_paged.models.config import DTYPES, ModelConfig
from pallas_paged.models.interface import CausalLM, CheckpointNames
from pallas_paged.models.kv_scales import SCALES, parameter_name
from pallas_paged.models.ported import PortedCheckpoint, is_ported
from pallas_paged.models.registry import FAMILIES, config_from_hf
from pallas_paged.models.tensors import Place, places, spread

ShardingOf = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]
"""From the logical names of a parameter's axes, and its shape, to where it goes."""


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Returns the configuration of the model in the folder `path`.

    Raises:
      FileNotFoundError: no such folder, or no `config.json` in it.
      ValueError: an unknown architecture, or a field that is missing, malformed or has a value that
        is not supported; named in the message.
    """
    return config_from_hf(read_json(model_file(path, "config.json")))


def open_checkpoint(path: str | os.PathLike[str]) -> HFCheckpoint | PortedCheckpoint:
    """Returns the tensors in the folder `path`, of either form.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a file is damaged, or the folder is half of a port.
    """
    folder = Path(path)
    if is_ported(folder):
        return PortedCheckpoint(folder)
    model_file(folder, "config.json")
    return HFCheckpoint(folder)


def load_model(
    path: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike = "auto",
    sharding: ShardingOf | None = None,
    config: ModelConfig | None = None,
) -> CausalLM:
    """Returns the model in the folder `path`, its weights where `sharding` puts them.

    Tensors are read and placed one after the other; the host holds none but the one in hand, and
    of a merged parameter those that were read before. A ported folder's are held against their
    checksums.

    Args:
      path: a folder with `config.json` and either `model.safetensors`, or
        `model.safetensors.index.json` and the files that it names; or a ported folder.
      dtype: of the parameters: float32, bfloat16 or float16; "auto" takes the one in `config.json`,
        or where that names none the one of the tensors.
      sharding: of a parameter, from the logical names of its axes and its shape; without it, all
        parameters go to JAX's default device.
      config: what `load_config` returned, if it was changed, as `ModelConfig.for_length` and
        `ModelConfig.for_devices` do.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: what `load_config` raises; a file is truncated or corrupt, or the folder is half
        of a port; tensors are missing, unused, misshapen or of an unsupported dtype (all are
        listed); tied embeddings differ; a value is too large for `dtype`.
    """
    checkpoint = open_checkpoint(path)
    config = load_config(path) if config is None else config
    tensors = parameters(path, checkpoint, config)
    param_dtype = _param_dtype(dtype, config, tensors)
    graph, abstract = _abstract(config, param_dtype)
    params = dict(nnx.to_flat_state(abstract))
    where = {tensors[name].name: place for name, place in places(abstract).items()}
    missing = collections.Counter(place.path for place in where.values())
    begun: dict[tuple[Any, ...], np.ndarray] = {}
    loaded = []

    def put(name: str, value: np.ndarray) -> None:
        path, slices, shape, is_static_scale, copies = where[name]
        param = params[path]
        value = cast(name, value, param.dtype)
        if is_static_scale:
            value = np.broadcast_to(value.reshape(-1), shape)
            if not (np.isfinite(value) & (value > 0)).all():
                raise ValueError(f"{name}={value}: scales must be positive and finite")
        if slices:
            if path not in begun:
                begun[path] = np.empty(param.shape, param_dtype)
            merged = begun[path]
            merged[slices] = spread(value, merged[slices].shape, copies)
            value = merged
        else:
            value = spread(value, param.shape, copies)
        missing[path] -= 1
        if not missing[path]:
            begun.pop(path, None)
            device = None if sharding is None else sharding(param.out_sharding, param.shape)
            loaded.append((path, param.replace(jnp.asarray(value, device=device))))

    checkpoint.read(list(where), put)
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def init_model(
    path: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike = "auto",
    seed: int = 0,
    config: ModelConfig | None = None,
) -> CausalLM:
    """Returns a model of the shape in the folder `path`, its weights drawn and not read.

    Only `config.json` is read. The same seed gives the same weights on the same platform.

    Args:
      path: a folder with `config.json`.
      dtype: of the parameters: float32, bfloat16 or float16; "auto" takes the one in `config.json`.
      seed: of the weights.
      config: see `load_model`.

    Raises:
      FileNotFoundError: no such folder, or no `config.json` in it.
      ValueError: what `load_config` raises; `dtype` is unsupported, or "auto" without one in
        `config.json`.
    """
    config = load_config(path) if config is None else config
    param_dtype = _param_dtype(dtype, config, {})
    return FAMILIES[config.architecture].model(config, dtype=param_dtype, rngs=nnx.Rngs(seed))


def abstract_model(config: ModelConfig, dtype: jax.typing.DTypeLike = "auto") -> CausalLM:
    """Returns a model of such a shape that has shapes and dtypes in the place of arrays.

    Raises:
      ValueError: as `init_model`, of `dtype`.
    """
    graph, abstract = _abstract(config, _param_dtype(dtype, config, {}))
    return nnx.merge(graph, abstract)


def parameters(
    path: str | os.PathLike[str], checkpoint: Checkpoint, config: ModelConfig
) -> dict[str, Tensor]:
    """Returns the checkpoint's tensors by the names that the model has for its own: one for each.

    Raises:
      ValueError: tensors are missing, unused or misshapen, all listed under the name `path`, or of
        an unsupported dtype; tied embeddings differ.
    """
    tensors = _by_parameter(checkpoint, FAMILIES[config.architecture].names, config)
    _, abstract = _abstract(config, jnp.float32)
    _check(path, tensors, places(abstract))
    unsupported = [f"{t.name} ({t.dtype})" for t in tensors.values() if t.dtype not in DTYPES]
    if unsupported:
        raise ValueError(
            f"tensors of a dtype that is not supported, only {', '.join(DTYPES)}: "
            + ", ".join(unsupported)
        )
    return tensors


def cast(name: str, value: np.ndarray, dtype: jax.typing.DTypeLike) -> np.ndarray:
    """Returns the value in another dtype, rounded to nearest; itself where it has it already.

    Raises:
      ValueError: a finite number would become infinite; `name` is the tensor's in the message.
    """
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        narrow = value.astype(dtype)
    if (
        jnp.finfo(dtype).max < jnp.finfo(value.dtype).max
        and (np.isfinite(narrow) != np.isfinite(value)).any()
    ):
        raise ValueError(
            f"{name} has values beyond {float(jnp.finfo(dtype).max):.4g}, the largest of {dtype}: "
            "choose another dtype"
        )
    return narrow


def numpy_dtype(name: str) -> np.dtype:
    """Returns the NumPy type with a name of `DTYPES`, bfloat16 among them."""
    return np.dtype(jnp.dtype(name))


def _abstract(config: ModelConfig, dtype: jax.typing.DTypeLike) -> tuple[Any, nnx.State]:
    """Returns a model's graph and its parameters, without any values."""
    build = FAMILIES[config.architecture].model
    return nnx.split(nnx.eval_shape(lambda: build(config, dtype=dtype, rngs=nnx.Rngs(0))))


def _by_parameter(
    checkpoint: Checkpoint, names: CheckpointNames, config: ModelConfig
) -> dict[str, Tensor]:
    """Returns the tensors by our names for them, without those that are no parameters."""
    found: dict[str, Tensor] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.name.endswith(names.derived):
            continue
        name = tensor.name
        for prefix, ours in names.prefixes:
            if name.startswith(prefix):
                name = ours + name.removeprefix(prefix)
                break
        if config.kv_cache_dtype is not None:
            name = parameter_name(name)
        if name in found:
            raise ValueError(f"{found[name].name} and {tensor.name} are the same parameter {name}")
        found[name] = tensor
    if config.tie_word_embeddings and names.output in found:
        output = found.pop(names.output)
        if names.embedding in found:
            _check_equal(checkpoint, found[names.embedding], output)
        found.setdefault(names.embedding, output)
    return found


def _check_equal(checkpoint: Checkpoint, embedding: Tensor, output: Tensor) -> None:
    values: dict[str, np.ndarray] = {}
    checkpoint.read((embedding.name, output.name), values.__setitem__)
    if not np.array_equal(values[embedding.name], values[output.name]):
        raise ValueError(
            f"{output.name} differs from {embedding.name}, but by config.json they are one tensor: "
            "set tie_word_embeddings to false there to use both"
        )


def _param_dtype(
    requested: jax.typing.DTypeLike, config: ModelConfig, tensors: Mapping[str, Tensor]
) -> jnp.dtype:
    if requested == "auto":
        in_files = {t.dtype for name, t in tensors.items() if not name.endswith(SCALES)}
        if config.checkpoint_dtype is None and len(in_files) != 1:
            raise ValueError(
                f"dtype='auto', but config.json names no dtype and the tensors are of {in_files}: "
                f"ask for one of {', '.join(DTYPES)}"
            )
        requested = config.checkpoint_dtype or in_files.pop()
    name = requested if isinstance(requested, str) else jnp.dtype(requested).name
    if name not in DTYPES:
        raise ValueError(f"dtype={requested!r} must be 'auto' or one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


def _check(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Place],
) -> None:
    """Raises `ValueError` with all tensors that are missing, unused or misshapen."""
    problems = [
        f"missing: {name}, {place.shape}" for name, place in expected.items() if name not in tensors
    ]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"unused: {tensor.name}, {tensor.shape}")
        elif not expected[name].takes(tensor.shape):
            shape = expected[name].shape
            problems.append(f"misshapen: {tensor.name} is {tensor.shape}, by config.json {shape}")
    if any(name.endswith(SCALES) and name not in tensors for name in expected):
        problems.append(
            "quantization_config in config.json promises these scales; without it the KV cache has "
            "a scale of its own for each token"
        )
    if problems:
        raise ValueError(
            f"the tensors in {path} are not those of its config.json:\n  " + "\n  ".join(problems)
        )
