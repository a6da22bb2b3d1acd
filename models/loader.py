"""From a Hugging Face model folder to a model: configuration, weights, generation defaults.

Reads `config.json` and safetensors files. Strict: what is missing, left over or does not fit is an
error that names it.
"""

import collections
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from pallas_paged.models.config import DTYPES, ModelConfig
from pallas_paged.models.interface import CausalLM, CheckpointNames
from pallas_paged.models.registry import FAMILIES, config_from_hf

_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class _Tensor(NamedTuple):
    """A tensor in a file, known by its header only."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Returns the configuration of the model in the folder `path`.

    Raises:
      FileNotFoundError: no such folder, or no `config.json` in it.
      ValueError: an unknown architecture, or a field that is missing, malformed or has a value that
        is not supported; named in the message.
    """
    return config_from_hf(_read_json(_model_file(path, "config.json")))


def load_eos_token_ids(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a sequence of the model in the folder `path`.

    They are `eos_token_id` in `generation_config.json`, or where that is missing in `config.json`;
    empty if neither has any.

    Raises:
      FileNotFoundError: no such folder, or no `config.json` in it.
      ValueError: `eos_token_id` is neither an integer nor a list of integers.
    """
    config_file = _model_file(path, "config.json")
    for file in (config_file.with_name("generation_config.json"), config_file):
        eos = _read_json(file).get("eos_token_id") if file.exists() else None
        if eos is not None:
            ids = eos if isinstance(eos, list) else [eos]
            if not all(type(token) is int for token in ids):
                raise ValueError(f"{file}: eos_token_id={eos!r} must be an integer or a list")
            return tuple(ids)
    return ()


def load_model(path: str | os.PathLike[str], dtype: jax.typing.DTypeLike = "auto") -> CausalLM:
    """Returns the model in the folder `path`, its weights on JAX's default device.

    Tensors are read and placed one after the other; the host holds none but the one in hand.

    Args:
      path: a folder with `config.json` and either `model.safetensors`, or
        `model.safetensors.index.json` and the files that it names.
      dtype: of the parameters: float32, bfloat16 or float16; "auto" takes the one in `config.json`,
        or where that names none the one of the tensors.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: what `load_config` raises; a file is truncated or corrupt; tensors are missing,
        unused, misshapen or of an unsupported dtype (all are listed); tied embeddings differ.
    """
    config = load_config(path)
    family = FAMILIES[config.architecture]
    tensors = _by_parameter(_scan(path), family.names, config)
    param_dtype = _param_dtype(dtype, config, tensors)
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: family.model(config, dtype=param_dtype, rngs=nnx.Rngs(0)))
    )
    params = {
        ".".join(map(str, keys)): (keys, param) for keys, param in nnx.to_flat_state(abstract)
    }
    _check(path, tensors, {name: param.shape for name, (_, param) in params.items()})
    loaded = []
    for name, value in _read(tensors):
        keys, param = params[name]
        loaded.append((keys, param.replace(jnp.asarray(value.astype(param_dtype, copy=False)))))
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def init_model(
    path: str | os.PathLike[str], dtype: jax.typing.DTypeLike = "auto", seed: int = 0
) -> CausalLM:
    """Returns a model of the shape in the folder `path`, its weights drawn and not read.

    Only `config.json` is read. The same seed gives the same weights on the same platform.

    Args:
      path: a folder with `config.json`.
      dtype: of the parameters: float32, bfloat16 or float16; "auto" takes the one in `config.json`.
      seed: of the weights.

    Raises:
      FileNotFoundError: no such folder, or no `config.json` in it.
      ValueError: what `load_config` raises; `dtype` is unsupported, or "auto" without one in
        `config.json`.
    """
    config = load_config(path)
    param_dtype = _param_dtype(dtype, config, {})
    return FAMILIES[config.architecture].model(config, dtype=param_dtype, rngs=nnx.Rngs(seed))


def _model_file(path: str | os.PathLike[str], name: str) -> Path:
    """Returns an existing file of the model folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}: a model is a local folder with config.json and safetensors files"
            " (`hf download REPOSITORY --local-dir FOLDER` makes one)"
        )
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}: it has {sorted(os.listdir(folder))}")
    return folder / name


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(values).__name__}")
    return values


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, framework="np") as tensors:
            yield tensors
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file ({error}): copy it again"
        ) from error


def _scan(path: str | os.PathLike[str]) -> list[_Tensor]:
    """Returns what the headers of the folder's safetensors files say."""
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return _scan_file(folder / "model.safetensors")
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor {index.name}: it has "
            f"{sorted(os.listdir(folder))}. Weights in another format must be saved as safetensors "
            "first (transformers' save_pretrained does)"
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index} has no object 'weight_map' of tensor names and file names")
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise FileNotFoundError(f"{index} names files that are missing: {', '.join(missing)}")
    tensors = [tensor for shard in shards for tensor in _scan_file(folder / shard)]
    in_files = {(tensor.name, tensor.file.name) for tensor in tensors}
    if differing := sorted(in_files ^ set(weight_map.items())):
        raise ValueError(f"{index} and its files disagree on (tensor, file): {differing}")
    return tensors


def _scan_file(file: Path) -> list[_Tensor]:
    with _opened(file) as tensors:
        slices = [(name, tensors.get_slice(name)) for name in tensors.keys()]  # noqa: SIM118
        return [_Tensor(file, n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices]


def _by_parameter(
    tensors: list[_Tensor], names: CheckpointNames, config: ModelConfig
) -> dict[str, _Tensor]:
    """Returns the tensors by the names of their parameters, without those that are none."""
    found: dict[str, _Tensor] = {}
    for tensor in tensors:
        if tensor.name.endswith(names.derived):
            continue
        name = tensor.name
        for prefix, ours in names.prefixes:
            if name.startswith(prefix):
                name = ours + name.removeprefix(prefix)
                break
        if name in found:
            raise ValueError(f"{found[name].name} and {tensor.name} are the same parameter {name}")
        found[name] = tensor
    if config.tie_word_embeddings and names.output in found:
        output = found.pop(names.output)
        if names.embedding in found:
            _check_equal(found[names.embedding], output)
        found.setdefault(names.embedding, output)
    return found


def _check_equal(embedding: _Tensor, output: _Tensor) -> None:
    values = dict(_read({"embedding": embedding, "output": output}))
    if not np.array_equal(values["embedding"], values["output"]):
        raise ValueError(
            f"{output.name} differs from {embedding.name}, but by config.json they are one tensor: "
            "set tie_word_embeddings to false there to use both"
        )


def _param_dtype(
    requested: jax.typing.DTypeLike, config: ModelConfig, tensors: Mapping[str, _Tensor]
) -> jnp.dtype:
    unsupported = [
        f"{tensor.name} ({tensor.dtype})"
        for tensor in tensors.values()
        if tensor.dtype not in _SAFETENSORS_DTYPES
    ]
    if unsupported:
        raise ValueError(
            f"tensors of a dtype that is not supported, only {', '.join(_SAFETENSORS_DTYPES)}: "
            + ", ".join(unsupported)
        )
    if requested == "auto":
        in_files = {_SAFETENSORS_DTYPES[tensor.dtype] for tensor in tensors.values()}
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
    tensors: Mapping[str, _Tensor],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises `ValueError` with all tensors that are missing, unused or misshapen."""
    problems = [
        f"missing: {name}, {shape}" for name, shape in expected.items() if name not in tensors
    ]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"unused: {tensor.name}, {tensor.shape}")
        elif tensor.shape != expected[name]:
            problems.append(
                f"misshapen: {tensor.name} is {tensor.shape}, by config.json {expected[name]}"
            )
    if problems:
        raise ValueError(
            f"the tensors in {path} are not those of its config.json:\n  " + "\n  ".join(problems)
        )


def _read(tensors: Mapping[str, _Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the values of the tensors under the mapping's names, opening each file once."""
    by_file = collections.defaultdict(list)
    for name, tensor in tensors.items():
        by_file[tensor.file].append((name, tensor))
    for file, members in by_file.items():
        with _opened(file) as opened:
            for name, tensor in members:
                yield name, opened.get_tensor(tensor.name)
