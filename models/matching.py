"""Which tensor of a checkpoint is which parameter of a model; all that does not fit is listed."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_paged.models.checkpoint import Checkpoint, Tensor, row_blocks
from pallas_paged.models.config import DTYPES, ModelConfig
from pallas_paged.models.interface import CheckpointNames
from pallas_paged.models.kv_scales import SCALES, parameter_name
from pallas_paged.models.registry import FAMILIES
from pallas_paged.models.tensors import Place, places

_COMPARED_BYTES = 256 << 20
"""Of two tensors that are to be equal, in memory at a time."""


def parameters(
    path: str | os.PathLike[str], checkpoint: Checkpoint, config: ModelConfig
) -> dict[str, Tensor]:
    """Returns the checkpoint's tensors by the names that the model has for its own: one for each.

    Raises:
      ValueError: tensors are missing, unused or misshapen, all listed under the name `path`, or of
        an unsupported dtype; tied embeddings differ.
    """
    tensors = by_parameter(checkpoint, FAMILIES[config.architecture].names, config)
    _, abstract = abstract_parameters(config, jnp.float32)
    expected = places(abstract)
    problems = differences(tensors, expected, "by config.json")
    if any(name.endswith(SCALES) and name not in tensors for name in expected):
        problems.append(
            "quantization_config in config.json promises these scales; without it the KV cache has "
            "a scale of its own for each token"
        )
    if problems:
        raise ValueError(
            f"the tensors in {path} are not those of its config.json:\n  " + "\n  ".join(problems)
        )
    unsupported = [f"{t.name} ({t.dtype})" for t in tensors.values() if t.dtype not in DTYPES]
    if unsupported:
        raise ValueError(
            f"tensors of a dtype that is not supported, only {', '.join(DTYPES)}: "
            + ", ".join(unsupported)
        )
    return tensors


def abstract_parameters(config: ModelConfig, dtype: jax.typing.DTypeLike) -> tuple[Any, nnx.State]:
    """Returns a model's graph and its parameters, without any values."""
    build = FAMILIES[config.architecture].model
    return nnx.split(nnx.eval_shape(lambda: build(config, dtype=dtype, rngs=nnx.Rngs(0))))


def by_parameter(
    checkpoint: Checkpoint, names: CheckpointNames, config: ModelConfig
) -> dict[str, Tensor]:
    """Returns the tensors by our names for them, without those that are no parameters.

    Raises:
      ValueError: two are the same parameter, or embeddings that are tied differ.
    """
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
    if embedding.dtype not in DTYPES:
        return  # and that is refused
    is_equal = embedding.shape == output.shape and output.dtype in DTYPES
    if is_equal and embedding.shape:
        for rows in row_blocks(embedding, slice(0, embedding.shape[0]), _COMPARED_BYTES):
            index = (rows, *(slice(0, length) for length in embedding.shape[1:]))
            (one,), (other,) = (
                checkpoint.read_slices(tensor.name, [index]) for tensor in (embedding, output)
            )
            is_equal = is_equal and np.array_equal(one, other)
    if not is_equal:
        raise ValueError(
            f"{output.name} differs from {embedding.name}, but by config.json they are one tensor: "
            "set tie_word_embeddings to false there to use both"
        )


def differences(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Place], whose: str
) -> list[str]:
    """Returns what is wrong with tensors, a line for each that is missing, unused or misshapen.

    `whose` says in front of an expected shape whose it is.
    """
    problems = [
        f"missing: {name}, {place.shape}" for name, place in expected.items() if name not in tensors
    ]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"unused: {tensor.name}, {tensor.shape}")
        elif not expected[name].takes(tensor.shape):
            shape = expected[name].shape
            problems.append(f"misshapen: {tensor.name} is {tensor.shape}, {whose} {shape}")
    return problems
