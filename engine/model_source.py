"""Where an engine's model comes from: a folder, or a program that has it in memory."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from flax import nnx

from pallas_paged.engine.device.new_weights import place
from pallas_paged.engine.device.placement import Placement
from pallas_paged.engine.sampling_params import SamplingParams
from pallas_paged.engine.text.tokenizer import Tokenizer, load_tokenizer, wrap_tokenizer
from pallas_paged.models import (
    CausalLM,
    ModelConfig,
    init_model,
    load_config,
    load_eos_token_ids,
    load_model,
    load_sampling_defaults,
)
from pallas_paged.models.config import DTYPES
from pallas_paged.models.given import GivenArrays, NameMapping
from pallas_paged.models.kv_scales import is_static_scale
from pallas_paged.models.matching import abstract_parameters
from pallas_paged.models.new_weights import Path, merged_parameters, sources
from pallas_paged.models.registry import FAMILIES

logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A model on its devices.

    Attributes:
      network: with its weights.
      shared: the paths of those parameters whose arrays are the caller's too.
    """

    network: CausalLM
    shared: frozenset[Path]


class ModelSource(Protocol):
    """A model before it is on its devices.

    Attributes:
      name: what the engine's configuration calls it.
      can_load: whether `load` can be called again.
    """

    name: str
    can_load: bool

    def shape(self) -> ModelConfig:
        """Returns its shape; `ValueError` or `FileNotFoundError` if there is none."""

    def load(
        self, shape: ModelConfig, dtype: Any, placement: Placement, *, seed: int | None = None
    ) -> LoadedModel:
        """Returns it on its devices.

        Args:
          shape: its own, for the engine's lengths and devices.
          dtype: of its parameters, see `EngineConfig`.
          placement: the devices.
          seed: draws weights instead of reading them.

        Raises:
          ValueError, FileNotFoundError: see `load_model`.
        """

    def tokenizer(self, folder: str | None) -> Tokenizer | None:
        """Returns its tokenizer, or the one in another folder; see `load_tokenizer`."""

    def eos_token_ids(self) -> Sequence[int]:
        """Returns the tokens that end its outputs; see `load_eos_token_ids`."""

    def sampling_defaults(self) -> SamplingParams:
        """Returns how its authors advise to sample; see `LLM.get_default_sampling_params`."""


class FolderSource:
    """A model in a folder."""

    can_load = True

    def __init__(self, folder: str):
        self.name = folder

    def shape(self) -> ModelConfig:
        """See `ModelSource`."""
        return load_config(self.name)

    def load(
        self, shape: ModelConfig, dtype: Any, placement: Placement, *, seed: int | None = None
    ) -> LoadedModel:
        """See `ModelSource`."""
        if seed is not None:
            network = init_model(self.name, dtype, seed, shape, placement.parameter)
        else:
            network = load_model(self.name, dtype, placement.parameter, shape)
        return LoadedModel(network, frozenset())

    def tokenizer(self, folder: str | None) -> Tokenizer | None:
        """See `ModelSource`."""
        return load_tokenizer(folder or self.name)

    def eos_token_ids(self) -> Sequence[int]:
        """See `ModelSource`."""
        return load_eos_token_ids(self.name)

    def sampling_defaults(self) -> SamplingParams:
        """See `ModelSource`."""
        defaults: dict[str, Any] = dict(load_sampling_defaults(self.name))
        try:
            return SamplingParams(**defaults)
        except ValueError as error:
            raise ValueError(
                f"the generation_config.json of {self.name}: {error}; or pass sampling_params"
            ) from error


class GivenSource:
    """A model that a program has: a module of ours, or a configuration with the weights.

    It holds the weights until `load` has given them to the engine.

    Args:
      model: a module, or a configuration of a family of ours.
      state: the weights of a configuration, see `GivenArrays`; None for a module.
      tokenizer: of transformers, or a folder with one; None for none.
      eos_token_ids: tokens that end an output, beside the tokenizer's.
      mapping: from the names of the weights to ours, see `GivenArrays`.

    Raises:
      ValueError: `model` is neither, or its state is missing, or of several dtypes, or none.
    """

    can_load = False

    def __init__(
        self,
        model: Any,
        state: Any = None,
        tokenizer: Any = None,
        eos_token_ids: Sequence[int] = (),
        mapping: NameMapping | None = None,
    ):
        is_module = isinstance(model, nnx.Module) and isinstance(
            getattr(model, "config", None), ModelConfig
        )
        if not is_module and not isinstance(model, ModelConfig):
            raise ValueError(
                f"model={model!r:.80} must be a module of pallas_paged.models, or the "
                "configuration of one, such as LlamaConfig, with state=; LLM(folder) loads a folder"
            )
        if is_module == (state is not None):
            raise ValueError(
                "pass a module, which has its weights, and no state; or a configuration, and the "
                "weights as state"
            )
        config = model.config if is_module else model
        if config.architecture not in FAMILIES:
            raise ValueError(
                f"{config.architecture} is none of the families {', '.join(FAMILIES)}: register it "
                "in pallas_paged.models.registry"
            )
        if config.kv_head_copies != 1:
            raise ValueError(
                f"kv_head_copies={config.kv_head_copies}: give the model as it is on one device; "
                "the engine makes the copies that its devices need"
            )
        self._arrays: GivenArrays | None = GivenArrays(model if is_module else state, mapping)
        dtypes = {
            tensor.dtype
            for name, tensor in self._arrays.tensors.items()
            if not is_static_scale(name)
        }
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        self._config = dataclasses.replace(
            config, checkpoint_dtype=dtype if dtype in DTYPES else None
        )
        self._tokenizer, self._eos_token_ids = tokenizer, tuple(eos_token_ids)
        self.name = config.architecture

    def shape(self) -> ModelConfig:
        """See `ModelSource`."""
        return self._config

    def load(
        self, shape: ModelConfig, dtype: Any, placement: Placement, *, seed: int | None = None
    ) -> LoadedModel:
        """See `ModelSource`; it can be called once, and draws nothing."""
        if seed is not None:
            raise ValueError("load_format='dummy' is for a folder: the model is given with weights")
        dtype = shape.checkpoint_dtype if dtype == "auto" else dtype
        if dtype is None:
            raise ValueError(
                f"dtype='auto', but the weights are not all of one of {', '.join(DTYPES)}: choose "
                "one of these as dtype"
            )
        arrays, self._arrays = self._arrays, None
        assert arrays is not None, "the weights have been given away"
        graph, params = abstract_parameters(shape, dtype)
        found = sources(shape, params, arrays, merged_parameters(shape))
        flat = nnx.to_flat_state(params)
        shardings = [placement.parameter(x.out_sharding, x.shape) for _, x in flat]
        placed = place([found[path] for path, _ in flat], shardings, placement)
        logger.info("weights: %s", placed)
        made = [(path, x.replace(y)) for (path, x), y in zip(flat, placed.leaves, strict=True)]
        shared = [path for (path, _), own in zip(flat, placed.owned, strict=True) if not own]
        return LoadedModel(nnx.merge(graph, nnx.from_flat_state(made)), frozenset(shared))

    def tokenizer(self, folder: str | None) -> Tokenizer | None:
        """See `ModelSource`."""
        given = self._tokenizer if folder is None else folder
        if given is None or isinstance(given, Tokenizer):
            return given
        if isinstance(given, str | os.PathLike):
            return load_tokenizer(given)
        return wrap_tokenizer(given)

    def eos_token_ids(self) -> Sequence[int]:
        """See `ModelSource`."""
        return self._eos_token_ids

    def sampling_defaults(self) -> SamplingParams:
        """See `ModelSource`: nobody advises anything."""
        return SamplingParams()
