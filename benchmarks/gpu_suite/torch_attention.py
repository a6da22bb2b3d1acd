"""PyTorch's ways to attend, made ready to be called: dense, FlexAttention over pages, Triton.

torch is imported by whoever calls, because JAX's users do not need it.
"""

import contextlib
import functools
import gc
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.gpu_suite import triton_paged
from benchmarks.gpu_suite.shapes import HEAD_DIM, Shape

PAGE_SIZE = 128
"""FlexAttention's own piece of keys; its pages cannot be smaller at full speed."""


class Peer(NamedTuple):
    """A way to attend, with inputs on the device.

    Attributes:
      q: [B, Hq, queries, D].
      attend: called with the number of a layer, which has keys and values of its own; returns the
        attention of q over them, like q.
      keys: called with the number of a sequence; returns its keys and values of layer 0 in order,
        each [Hk, context, D].
    """

    q: Any
    attend: Callable[[int], Any]
    keys: Callable[[int], tuple[Any, Any]]


class Setting(NamedTuple):
    """What all of them are made for.

    Attributes:
      torch: the module.
      device: "cuda", or "cpu" for toys.
      shape: of the step.
      layers: how many have keys and values of their own, which take turns to miss the cache.
    """

    torch: Any
    device: str
    shape: Shape
    layers: int

    def random(self, *size: int, dtype: Any = None) -> Any:
        """Returns standard-normal numbers, bfloat16 unless told otherwise."""
        return self.torch.randn(size, dtype=dtype or self.torch.bfloat16, device=self.device)

    def queries(self, dtype: Any = None) -> Any:
        """Returns [B, Hq, queries, D]."""
        shape = self.shape
        return self.random(shape.batch, shape.num_q_heads, shape.queries, HEAD_DIM, dtype=dtype)

    def make_room(self, page_size: int) -> None:
        """Frees what is unused; raises `NotImplementedError` if what is to come does not fit."""
        padded = self.shape._replace(block_size=page_size)
        rows = padded.moved_bytes - padded.kv_bytes
        if reason := too_large(self.torch, self.device, self.layers * padded.kv_bytes + 4 * rows):
            raise NotImplementedError(reason)


def too_large(torch: Any, device: str, num_bytes: float) -> str | None:
    """Returns why so many bytes do not fit on the device now, or None; frees what is unused."""
    gc.collect()
    if device == "cpu":
        return None
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if num_bytes < 0.95 * free:
        return None
    return f"{num_bytes / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free"


def sdpa(setting: Setting, cudnn: bool = False) -> dict[str, Peer]:
    """Returns `scaled_dot_product_attention` over contiguous keys, by torch's choice or cuDNN's."""
    from torch.nn.attention import SDPBackend, bias, sdpa_kernel

    shape = setting.shape
    is_chunk = 1 < shape.queries < shape.context
    if cudnn and setting.device == "cpu":
        raise NotImplementedError("cuDNN needs a GPU")
    if cudnn and is_chunk:
        raise NotImplementedError("torch's causal mask with an offset does not reach cuDNN")
    setting.make_room(1)
    size = shape.batch, shape.num_kv_heads, shape.context, HEAD_DIM
    pools = [(setting.random(*size), setting.random(*size)) for _ in range(setting.layers)]
    q = setting.queries()
    chosen = functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
    mask: dict[str, Any] = {"is_causal": shape.queries > 1}
    if is_chunk:
        mask = {"attn_mask": bias.causal_lower_right(shape.queries, shape.context)}

    def attend(layer: int) -> Any:
        with chosen() if cudnn else contextlib.nullcontext():
            return setting.torch.nn.functional.scaled_dot_product_attention(
                q, *pools[layer], enable_gqa=True, **mask
            )

    return {"": Peer(q, attend, lambda seq: (pools[0][0][seq], pools[0][1][seq]))}


def flex_paged(setting: Setting) -> dict[str, Peer]:
    """Returns compiled FlexAttention over shuffled pages of 128 tokens; interpreted on a CPU.

    Compiled for these sizes alone: what an earlier case compiled is forgotten, else torch would
    compile the second for any size.
    """
    torch, device, shape, layers = setting
    from torch.nn.attention import flex_attention as flex
    from torch.nn.attention.experimental._paged_attention import PagedAttention

    setting.make_room(PAGE_SIZE)
    per_seq = math.ceil(shape.context / PAGE_SIZE)
    num_pages = shape.batch * per_seq
    paged = PagedAttention(num_pages, PAGE_SIZE, shape.batch, device=device)
    # Shuffled by hand: `reserve` asks the device for every page.
    pages = torch.randperm(num_pages, device=device).view(shape.batch, per_seq)
    paged.page_table[:, :per_seq] = pages
    paged.physical_to_logical.scatter_(
        1, pages, torch.arange(per_seq, device=device).expand(shape.batch, per_seq)
    )
    paged.capacity[:] = per_seq * PAGE_SIZE
    first = shape.context - shape.queries

    def mask_mod(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
        del b, h
        return kv_index <= q_index + first

    logical = flex.create_block_mask(
        mask_mod, shape.batch, None, shape.queries, per_seq * PAGE_SIZE, device=device
    )
    lengths = torch.full((shape.batch,), shape.context, device=device)
    rows = torch.arange(shape.batch, device=device)
    mask = paged.convert_logical_block_mask(logical, rows, lengths)
    score_mod = paged.get_score_mod(None, lengths)
    size = 1, shape.num_kv_heads, num_pages * PAGE_SIZE, HEAD_DIM
    pools = [(setting.random(*size), setting.random(*size)) for _ in range(layers)]
    q = setting.queries()
    attend = flex.flex_attention
    if device == "cuda":
        torch._dynamo.reset()
        attend = torch.compile(attend, dynamic=False)

    def keys(seq: int) -> tuple[Any, Any]:
        within = torch.arange(PAGE_SIZE, device=device)
        slots = (pages[seq][:, None] * PAGE_SIZE + within).flatten()[: shape.context]
        return pools[0][0][0, :, slots], pools[0][1][0, :, slots]

    def one_layer(layer: int) -> Any:
        return attend(q, *pools[layer], score_mod=score_mod, block_mask=mask, enable_gqa=True)

    return {"": Peer(q, one_layer, keys)}


def paged_in_triton(setting: Setting) -> dict[str, Peer]:
    """Returns the kernel of our own over shuffled pages in each of its ways to work; decode only.

    On a CPU it is interpreted if TRITON_INTERPRET=1 says so, in float16.
    """
    torch, device, shape, layers = setting
    if shape.queries > 1:
        raise NotImplementedError("decode only")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotImplementedError("Triton needs a GPU, or TRITON_INTERPRET=1")
    triton_paged.kernels()
    setting.make_room(shape.block_size)
    per_seq = shape.blocks_per_seq
    num_pages = layers * shape.batch * per_seq
    tables = torch.randperm(num_pages, device=device).to(torch.int32)
    tables = tables.view(layers, shape.batch, per_seq)
    lens = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    size = num_pages, shape.num_kv_heads, shape.block_size, HEAD_DIM
    k, v = setting.random(*size, dtype=dtype), setting.random(*size, dtype=dtype)
    q = setting.queries(dtype)
    num_sms = 4
    if device == "cuda":
        num_sms = torch.cuda.get_device_properties(0).multi_processor_count

    def keys(seq: int) -> tuple[Any, Any]:
        ids = tables[0, seq].long()
        in_order = (pool[ids].transpose(0, 1).flatten(1, 2) for pool in (k, v))
        k_seq, v_seq = (pool[:, : shape.context] for pool in in_order)
        return k_seq, v_seq

    def attend(config: triton_paged.Config, layer: int) -> Any:
        programs = shape.batch * shape.num_kv_heads
        splits = triton_paged.num_splits(programs, shape.context, config.tile, num_sms)
        out = triton_paged.paged_decode(q[:, :, 0], k, v, tables[layer], lens, splits, config)
        return out[:, :, None]

    return {
        f"tile {config.tile}, {config.warps} warps, {config.stages} stages": Peer(
            q, functools.partial(attend, config), keys
        )
        for config in triton_paged.CONFIGS
    }


PEERS: dict[str, Callable[[Setting], dict[str, Peer]]] = {
    "sdpa": sdpa,
    "sdpa_cudnn": functools.partial(sdpa, cudnn=True),
    "flex_paged": flex_paged,
    "triton_paged": paged_in_triton,
}
"""By the names of their figures. Where there are several variants, the fastest counts."""
COMPILED = ("flex_paged", "triton_paged")
"""Those that torch or Triton must compile for a size."""
