"""Settings of every test: two CPU devices, strict dtypes, checked shapes."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# An interpreted kernel blocks one of the CPU client's threads for each of its own that waits at a
# barrier; with as many threads as two cores give, it would wait forever.
os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

LAYER_1 = ["pallas_paged.kv_cache", "pallas_paged.block_tables", "pallas_paged.ops"]
MODELS = [f"pallas_paged.models.{name}" for name in ("attend", "decoder", "layers", "opt", "rope")]
install_import_hook(LAYER_1 + MODELS, "beartype.beartype")
