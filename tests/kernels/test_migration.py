"""The page for users of JAX's deprecated paged attention tells the truth."""

import inspect
import pathlib
import re
import warnings

import jax.numpy as jnp
import numpy as np

import pallas_paged

PAGE = pathlib.Path(pallas_paged.__file__).with_name("README.md").read_text()

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas.ops.gpu import paged_attention as deprecated


def test_every_argument_has_a_line() -> None:
    first_column = "".join(re.findall(r"^\|([^|]*)\|", PAGE, flags=re.MULTILINE))
    for name in inspect.signature(deprecated.paged_attention).parameters:
        assert f"`{name}`" in first_column, name


def test_the_example_gives_what_jax_gave() -> None:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    example: dict = {"__name__": "example"}
    exec(compile(source, "README.md", "exec"), example)
    q, tables, lengths = (example[name] for name in ("q", "block_tables", "lengths"))
    # JAX's own oracle takes each sequence's keys and values in order: [B, M * S, Hk, D].
    k, v = (
        jnp.moveaxis(pages[:, tables], 0, 3).reshape(len(q), -1, pages.shape[0], q.shape[2])
        for pages in example["pages"]
    )
    for soft_cap in (None, 0.7):
        ours = example["paged_attention_like_jax"](
            q, *example["pages"], tables, lengths, soft_cap=soft_cap
        )
        expected = deprecated.paged_attention_reference(
            q, k, v, lengths, attn_logits_soft_cap=soft_cap
        )
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
