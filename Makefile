# `make demo` and `make test` do all their own set-up in .venv; nothing else is touched.

VENV ?= .venv
PY := $(VENV)/bin/python
OLDEST := .venv-oldest
OLDEST_JAX := 0.11.2
EVAL := .venv-eval
CLIENTS := .venv-clients
GPU := .venv-gpu
FUZZ := .venv-fuzz
RAY := .venv-ray
TUNIX := .venv-tunix
TUNIX_VERSION := 0.1.7
GPU_JAX ?= 0.11.2
SCHEMATHESIS := 4.32.5
SECONDS ?= 300

.PHONY: demo serve test check format strict speed soak fuzz oldest kernels-full kernels-mutate \
  sharing-mutate eval-check clients ray-check tunix-check gpu-programs dist clean

demo: $(VENV)/.base
	@$(PY) -m pallas_paged.engine.demo

# A server over HTTP, with what ARGS says: make serve ARGS='--model=FOLDER --port=8001'
serve: $(VENV)/.serve
	@exec $(PY) -m pallas_paged.engine.serve $(ARGS)

# Three processes keep two cores busy: tests also wait, for programs that they start. Cases of
# interpreted kernels that are marked `tabled` are left out: the tables of `make kernels-full` hold
# every two properties of theirs in one case, and a test fails when these are not of today's sources.
# What is marked `slow`, above all rehearsals of the GPU suite and most benchmark programs, is left
# to `make check`. Files begin in the order of tests/conftest.py, not by how many tests they have.
TEST := $(PY) -m pytest -n 3 --dist=loadfile --no-loadscope-reorder

test: $(VENV)/.test
	@$(TEST) -m 'not slow and not tabled'

check: $(VENV)/.test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(TEST) -m 'not tabled'

format: $(VENV)/.test
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# What a program of a user's own may have switched on: 64-bit types, and a search for NaN. Tests of
# kernels poison memory with NaN on purpose, so that the search goes through engines alone.
STRICT_ENGINE := tests/engine/test_logprobs.py tests/engine/test_processed_logprobs.py \
  tests/engine/test_token_logprobs.py::test_figures_are_those_of_full_steps \
  tests/engine/test_logit_rules.py::test_many_requests_of_all_kinds \
  tests/engine/test_full_step.py::test_prompt_logprobs_across_every_chunk_split \
  'tests/engine/test_recovery.py::test_a_tenth_of_the_memory_gives_the_same_tokens[swap]' \
  $(addprefix tests/engine/test_sampling.py::,test_a_seed_gives_these_tokens \
    test_top_k_keeps_the_first_k_however_they_are_found)
STRICT_KERNELS := tests/kernels/test_kv_write.py tests/kernels/test_block_tables.py \
  tests/kernels/test_block_copies.py \
  $(addprefix tests/kernels/test_attention.py::,test_equals_dense_softmax test_example_by_hand \
    test_decode_loop_equals_prefill)

strict: $(VENV)/.test
	@JAX_ENABLE_X64=1 $(PY) -m pytest -n 2 --dist=loadfile $(STRICT_ENGINE) $(STRICT_KERNELS)
	@JAX_DEBUG_NANS=1 $(PY) -m pytest -n 2 --dist=loadfile $(STRICT_ENGINE)

# The engine's decode step beside the sum of its parts, and what is worse than it was: minutes, on a
# machine that does nothing else.
speed: $(VENV)/.test
	@$(PY) -m benchmarks.step_floor

# Hundreds of clients that come and go at a server with too little memory, for minutes.
soak: $(VENV)/.test
	@JAX_PLATFORMS=cpu $(PY) -m benchmarks.soak --seconds=$(SECONDS)

# Requests that schemathesis makes from the server's /openapi.json, for some minutes.
fuzz: $(VENV)/.test $(FUZZ)/.fuzz
	@JAX_PLATFORMS=cpu $(PY) -m tests.engine.serve.fuzz $(FUZZ)/bin/st $(SECONDS)

# Kernels, block tables and a request from end to end on the oldest JAX we support; random operations
# on block tables are the newest JAX's, and what kernels spill is in this JAX's table,
# and Numba's code for other CPUs is the same, as it is for most kinds of steps.
oldest: $(OLDEST)/.oldest
	@$(OLDEST)/bin/python -m pytest -n 2 --dist=loadfile --ignore-glob='*stateful*' \
	  -k 'not no_spills and not other_vectors and not (test_equals_reference and numba)' \
	  -m 'not tabled' tests/kernels tests/engine/test_smoke.py

# The model of lm-evaluation-harness against what lm_eval's own `hf` was recorded to answer, in an
# environment that has lm_eval and no torch.
eval-check: $(EVAL)/.eval
	@JAX_PLATFORMS=cpu $(EVAL)/bin/python -m pytest -s tests/engine/lm_eval_check.py

# A server of the demo model, asked by openai, litellm and llm as their users do, in an environment
# that has these.
clients: $(CLIENTS)/.clients
	@$(CLIENTS)/bin/python -m tests.clients.check

# Two replicas of the demo model on Ray Serve, of which some are killed under load: some minutes.
ray-check: $(RAY)/.ray
	@JAX_PLATFORMS=cpu $(RAY)/bin/python -m tests.on_ray.check

# Tunix's GRPO learner trains the demo model, with this engine as its sampler: some minutes.
tunix-check: $(TUNIX)/.tunix
	@JAX_PLATFORMS=cpu $(TUNIX)/bin/python -m tests.with_tunix.check

# Compile every named program of the kernels and interpret every named case with both JAX, as far as
# the committed tables are not up to date; may be stopped and started again.
kernels-full: $(VENV)/.test $(OLDEST)/.oldest
	@JAX_PLATFORMS=cpu $(PY) -m tests.kernels.full
	@JAX_PLATFORMS=cpu $(OLDEST)/bin/python -m tests.kernels.full

# Break the kernels on purpose, and see their tests fail: many minutes.
kernels-mutate: $(VENV)/.test
	@$(PY) -m tests.kernels.mutate_decode
	@$(PY) -m tests.kernels.mutate_prefill
	@$(PY) -m tests.kernels.mutate_ampere
	@$(PY) -m tests.kernels.mutate_blackwell
	@$(PY) -m tests.kernels.mutate_cache
	@$(PY) -m tests.kernels.mutate_cpu

# Break the sharing of blocks and beam search on purpose, and see the tests fail: some minutes.
sharing-mutate: $(VENV)/.test
	@$(PY) -m tests.engine.mutate_sharing
	@$(PY) -m tests.engine.mutate_beams
	@$(PY) -m tests.engine.mutate_steps
	@$(PY) -m tests.engine.mutate_cascade
	@$(PY) -m tests.engine.mutate_grammars
	@$(PY) -m tests.engine.mutate_async
	@$(PY) -m tests.engine.mutate_plans
	@$(PY) -m tests.engine.mutate_weights

# What the GPU suite runs, compiled here for a machine with that JAX for CUDA 13: it loads it with
# `python -m benchmarks.gpu_suite --out=DIR --programs=.gpu-programs`.
gpu-programs: $(GPU)/.gpu
	@JAX_PLATFORMS=cpu $(GPU)/bin/python -m benchmarks.gpu_suite.carry --out=.gpu-programs

# sdist -> wheel -> an empty environment -> a request, run from another directory.
dist: $(VENV)/.test
	@rm -rf dist && $(PY) -m build --outdir dist .
	@set -e; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	$(PY) -m venv "$$work/venv"; \
	"$$work/venv/bin/pip" install --quiet --no-compile --constraint constraints.txt dist/*.whl; \
	cd "$$work" && venv/bin/python -m pallas_paged.engine.generate \
	  --prompt='def main():' --max_tokens=8 --temperature=0

clean:
	rm -rf $(VENV) $(OLDEST) $(EVAL) $(CLIENTS) $(FUZZ) $(RAY) $(TUNIX) $(GPU) .gpu-programs dist

# --- set-up -----------------------------------------------------------------------------------
# With --no-compile: pip would compile every file of every package, Python compiles what it imports.

$(VENV)/.base: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing pallas-paged into $(VENV) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e .
	@touch $@

$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing pallas-paged with its server into $(VENV) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[serve]'
	@touch $(VENV)/.base $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing pallas-paged with its test tools into $(VENV) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[test]'
	@touch $(VENV)/.base $(VENV)/.serve $@

$(OLDEST)/.oldest: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory VENV=$(OLDEST) $(OLDEST)/.test
	@$(OLDEST)/bin/pip install --quiet --no-compile jax==$(OLDEST_JAX) jaxlib==$(OLDEST_JAX) \
	  jax-cuda12-plugin==$(OLDEST_JAX) jax-cuda12-pjrt==$(OLDEST_JAX)
	@touch $@

# With what tests/conftest.py imports; [api] is for tests/engine/lm_eval_over_http.py.
$(EVAL)/.eval: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory VENV=$(EVAL) $(EVAL)/bin/pip
	@$(EVAL)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  -c constraints.txt -e '.[eval]' 'lm_eval[api]' pytest hypothesis beartype
	@touch $@

$(CLIENTS)/.clients: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory VENV=$(CLIENTS) $(CLIENTS)/.serve
	@$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile openai litellm llm
	@touch $@

# With pytest, for what the check says of errors.
$(RAY)/.ray: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory VENV=$(RAY) $(RAY)/bin/pip
	@$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  -c constraints.txt -e '.[ray]' pytest
	@touch $@

# Without the pins of what Tunix wants older.
$(TUNIX)/.tunix: pyproject.toml constraints.txt Makefile
	@$(MAKE) --no-print-directory VENV=$(TUNIX) $(TUNIX)/bin/pip
	@grep -vE '^(safetensors|transformers|tokenizers|huggingface_hub)==' constraints.txt > $(TUNIX)/constraints.txt
	@$(TUNIX)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  -c $(TUNIX)/constraints.txt -e '.[tunix]' google-tunix==$(TUNIX_VERSION) pytest
	@touch $@

# By itself: it only sends requests.
$(FUZZ)/.fuzz: Makefile
	@$(MAKE) --no-print-directory VENV=$(FUZZ) $(FUZZ)/bin/pip
	@$(FUZZ)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  schemathesis==$(SCHEMATHESIS)
	@touch $@

$(GPU)/.gpu: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory VENV=$(GPU) $(GPU)/.base
	@$(GPU)/bin/pip install --quiet --no-compile --no-deps jax==$(GPU_JAX) jaxlib==$(GPU_JAX) \
	  jax-cuda13-plugin==$(GPU_JAX) jax-cuda13-pjrt==$(GPU_JAX) \
	  'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*'
	@touch $@

# The first Python >= 3.12 found; the names that most systems, pyenv (.python-version) and uv give.
$(VENV)/bin/pip:
	@rm -rf $(VENV); \
	for python in python3.12 python3 python3.13 python3.14 python; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	    if $$python -m venv $(VENV) 2>/dev/null; then exit 0; fi; \
	    rm -rf $(VENV); no_venv=$$python; \
	  fi; \
	done; \
	if command -v uv >/dev/null 2>&1 && uv venv --quiet --seed --python 3.12 $(VENV); then exit 0; fi; \
	if [ -n "$$no_venv" ]; then \
	  echo "$$no_venv cannot make virtual environments: install its venv module" >&2; \
	  echo "(Debian, Ubuntu: apt-get install python3-venv), or install uv." >&2; \
	else \
	  echo "pallas-paged needs Python 3.12 or newer as python3.12 or python3, or uv, on the PATH." >&2; \
	  echo "Found: $$(python3 --version 2>&1 || true)" >&2; \
	fi; exit 1
