"""From a model folder to a model: configuration and weights.

A folder is a Hugging Face one, with `config.json` and safetensors files, or one that
`pallas_paged.models.port` made of it. Strict: what is missing, left over or does not fit is an
error that names it.
"""

import collections
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_paged.models.checkpoint import Checkpoint, HFCheckpoint, Tensor, model_file, read_json
from pallas_paged.models.config import DTYPES, ModelConfig
from pallas_paged.models.interface import CausalLM
from pallas_paged.models.kv_scales import SCALES
from pallas_paged.models.matching import abstract_parameters, parameters
from pallas_paged.models.ported import PortedCheckpoint, is_ported
from pallas_paged.models.registry import FAMILIES, config_from_hf
from pallas_paged.models.sharded import ShardingOf, is_split, read_parameter
from pallas_paged.models.tensors import Place, places, spread

_DRAWN_BYTES = 512 << 20
"""Of parameters that one program draws: it takes more memory than its share of them."""


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
    of a merged parameter those that were read before. A parameter that is split over devices is
    made of the slices that this process's devices need, and nothing else is read. What is read of
    a ported folder is held against its checksums.

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
    graph, abstract = abstract_parameters(config, param_dtype)
    params = dict(nnx.to_flat_state(abstract))
    where = {tensors[name].name: place for name, place in places(abstract).items()}
    shardings = {
        path: None if sharding is None else sharding(param.out_sharding, param.shape)
        for path, param in params.items()
    }
    whole, split = dict[str, Place](), dict[tuple[Any, ...], dict[str, Place]]()
    for name, place in where.items():
        of_path = split.setdefault(place.path, {}) if is_split(shardings[place.path]) else whole
        of_path[name] = place
    loaded = _read_whole(checkpoint, params, whole, shardings)
    for at, parts in split.items():
        to = shardings[at]
        assert to is not None
        value = read_parameter(params[at], to, parts, checkpoint, _prepared)
        loaded.append((at, params[at].replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _read_whole(
    checkpoint: Checkpoint,
    params: Mapping[tuple[Any, ...], Any],
    where: Mapping[str, Place],
    shardings: Mapping[tuple[Any, ...], jax.sharding.Sharding | None],
) -> list[tuple[tuple[Any, ...], Any]]:
    """Returns the parameters that the tensors in `where` make up, each on one device."""
    missing = collections.Counter(place.path for place in where.values())
    begun: dict[tuple[Any, ...], np.ndarray] = {}
    loaded = []

    def put(name: str, value: np.ndarray) -> None:
        place = where[name]
        path, slices, copies = place.path, place.slices, place.copies
        param = params[path]
        value = _prepared(name, value, place, param.dtype)
        if slices:
            if path not in begun:
                begun[path] = np.empty(param.shape, param.dtype)
            merged = begun[path]
            merged[slices] = spread(value, merged[slices].shape, copies)
            value = merged
        else:
            value = spread(value, param.shape, copies)
        missing[path] -= 1
        if not missing[path]:
            begun.pop(path, None)
            loaded.append((path, param.replace(jnp.asarray(value, device=shardings[path]))))

    if where:
        checkpoint.read(list(where), put)
    return loaded


def _prepared(name: str, value: np.ndarray, place: Place, dtype: Any) -> np.ndarray:
    """Returns a tensor, or a slice of it, in the dtype of its parameter; scales one for each head.

    Raises:
      ValueError: a value is too large for the dtype, or a scale is none.
    """
    value = cast(name, value, dtype)
    if place.is_static_scale:
        value = np.broadcast_to(value.reshape(-1), place.shape)
        if not (np.isfinite(value) & (value > 0)).all():
            raise ValueError(f"{name}={value}: scales must be positive and finite")
    return value


def init_model(
    path: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike = "auto",
    seed: int = 0,
    config: ModelConfig | None = None,
    sharding: ShardingOf | None = None,
) -> CausalLM:
    """Returns a model of the shape in the folder `path`, its weights drawn and not read.

    Only `config.json` is read. The same seed gives the same weights on the same platform, up to
    rounding in the last place, however they are split. Those that are split are drawn where they
    go, some at a time.

    Args:
      path: a folder with `config.json`.
      dtype: of the parameters: float32, bfloat16 or float16; "auto" takes the one in `config.json`.
      seed: of the weights.
      config: see `load_model`, as is `sharding`.
      sharding: without it, or where it splits nothing, JAX's default device has all parameters.

    Raises:
      FileNotFoundError: no such folder, or no `config.json` in it.
      ValueError: what `load_config` raises; `dtype` is unsupported, or "auto" without one in
        `config.json`.
    """
    config = load_config(path) if config is None else config
    param_dtype = _param_dtype(dtype, config, {})
    build = FAMILIES[config.architecture].model

    def draw() -> CausalLM:
        return build(config, dtype=param_dtype, rngs=nnx.Rngs(seed))

    if sharding is None:
        return draw()
    graph, abstract = abstract_parameters(config, param_dtype)
    params = nnx.to_flat_state(abstract)
    shardings = [sharding(param.out_sharding, param.shape) for _, param in params]
    if not any(map(is_split, shardings)):
        return draw()

    def values() -> list[jax.Array]:
        return [param[...] for _, param in nnx.to_flat_state(nnx.state(draw()))]

    traced = jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(values)())
    drawn: list[jax.Array] = []
    for group in _groups([param.size * param.dtype.itemsize for _, param in params]):
        # What the others are drawn with is left out of the program.
        some = jax.jit(lambda group=group: traced()[group], out_shardings=shardings[group])
        drawn += some()
    of_paths = [(path, p.replace(x)) for (path, p), x in zip(params, drawn, strict=True)]
    return nnx.merge(graph, nnx.from_flat_state(of_paths))


def _groups(sizes: Sequence[int]) -> Iterator[slice]:
    """Yields groups of neighbours of up to `_DRAWN_BYTES` together, or one that is larger."""
    begin = held = 0
    for index, size in enumerate(sizes):
        if index > begin and held + size > _DRAWN_BYTES:
            yield slice(begin, index)
            begin, held = index, 0
        held += size
    yield slice(begin, len(sizes))


def abstract_model(config: ModelConfig, dtype: jax.typing.DTypeLike = "auto") -> CausalLM:
    """Returns a model of such a shape that has shapes and dtypes in the place of arrays.

    Raises:
      ValueError: as `init_model`, of `dtype`.
    """
    graph, abstract = abstract_parameters(config, _param_dtype(dtype, config, {}))
    return nnx.merge(graph, abstract)


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
