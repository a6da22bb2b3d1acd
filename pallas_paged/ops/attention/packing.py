"""Query rows that share a KV head, put side by side for the kernels, and results taken apart again.

In XLA, before and after the kernels. A packed row is one query head of one token.
"""

import jax
import jax.numpy as jnp

from pallas_paged.ops.attention.problem import AttentionProblem


def pack(
    q: jax.Array, first_tokens: jax.Array, problem: AttentionProblem, num_rows: int
) -> jax.Array:
    """Returns [R, Hk, rows, D] of q [T, Hq, D]: the heads of a group, token after token, padded.

    R counts tokens where a run has one of them, and then this is no more than padding, which XLA
    fuses into what computes q; otherwise runs. Tokens that a run does not have are somebody else's:
    computed and not used.

    Args:
      q: the queries.
      first_tokens: i32[R], the first token of each run of at most `problem.max_tokens`.
      problem: what the kernel is specialised for.
      num_rows: to pad to.
    """
    num_tokens, _, head_dim = q.shape
    rows = q.reshape(num_tokens, problem.num_kv_heads, problem.group, head_dim)
    if problem.max_tokens > 1:
        tokens = jnp.arange(problem.max_tokens, dtype=jnp.int32)
        tokens = first_tokens[:, None] + tokens[None, :]
        rows = jnp.swapaxes(rows.at[tokens].get(mode="clip"), 1, 2)  # [R, Hk, tokens, G, D]
        rows = rows.reshape(*rows.shape[:2], -1, head_dim)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, num_rows - rows.shape[2]), (0, 0)))


def unpack(
    packed: jax.Array,
    places: tuple[jax.Array, jax.Array],
    is_real: jax.Array,
    padding: float,
    problem: AttentionProblem,
) -> jax.Array:
    """Returns [T, Hq, ...] of results [R, Hk, rows, ...], packed as `pack` packs queries.

    If nobody asks for it, XLA leaves it out.

    Args:
      packed: the results.
      places: i32[T] each, the run of every token and its place there.
      is_real: bool[T], False for padding tokens.
      padding: what these get.
      problem: what the kernel is specialised for.
    """
    run, place = places
    used = packed[:, :, : problem.group * problem.max_tokens]
    if problem.max_tokens > 1:
        used = used.reshape(*used.shape[:2], -1, problem.group, *used.shape[3:])
        used = used[run, :, place]
    heads = used.reshape(is_real.shape[0], problem.num_q_heads, *used.shape[3:])
    mask = is_real.reshape(-1, *[1] * (heads.ndim - 1))
    return jnp.where(mask, heads, jnp.asarray(padding, heads.dtype))


def per_row(
    per_head: jax.Array | None,
    num_kv_heads: int,
    num_tokens: int,
    num_rows: int,
    *,
    heads_first: bool = False,
) -> jax.Array | None:
    """Returns numbers per query head as f32[Hk, rows], one for each row of a tile of queries.

    Args:
      per_head: f32[Hq], or None, and then there are none.
      num_kv_heads: Hk.
      num_tokens: of a tile.
      num_rows: to pad to.
      heads_first: whether all tokens of a head follow each other, or all heads of a token.
    """
    if per_head is None:
        return None
    if heads_first:
        rows = jnp.repeat(per_head, num_tokens).reshape(num_kv_heads, -1)
    else:
        rows = jnp.tile(per_head.reshape(num_kv_heads, -1), (1, num_tokens))
    return jnp.pad(rows, ((0, 0), (0, num_rows - rows.shape[1])))
