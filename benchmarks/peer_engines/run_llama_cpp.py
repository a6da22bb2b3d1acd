"""Drives llama.cpp with several sequences in a batch, for `benchmarks.peers`.

llama-cpp-python has no continuous batching of its own: what llama.cpp's examples `batched` and
`parallel` do with its library is done here. Keys and values are float32, without flash attention,
which would compute with float16.
"""

import collections
import ctypes
import pathlib
from collections.abc import Callable

import gguf
import llama_cpp
import numpy as np
from peer_protocol import Answer, Job, main
from safetensors.numpy import load_file

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _file(job: Job) -> pathlib.Path:
    return pathlib.Path(job.converted, "model.gguf")


def convert(job: Job) -> None:
    """Writes the model as a GGUF file without a vocabulary."""
    config = job.config()
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(_file(job), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in load_file(pathlib.Path(job.model, "model.safetensors")).items():
        part = name.removesuffix(".weight")
        layer = ""
        if part.startswith("model.layers."):
            index, part = part.removeprefix("model.layers.").split(".", 1)
            layer = f"blk.{index}."
        if part.endswith(("q_proj", "k_proj")):
            # llama.cpp rotates neighbours, Hugging Face's layout halves.
            count = heads if part.endswith("q_proj") else kv_heads
            halves = tensor.reshape(count, 2, -1, tensor.shape[1])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        writer.add_tensor(f"{layer}{_NAMES[part]}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Batch:
    """One step's tokens, each with its sequence and position."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.batch = llama_cpp.llama_batch_init(size, 0, 1)

    @property
    def room(self) -> int:
        """How many tokens still fit."""
        return int(self._size - self.batch.n_tokens)

    def add(self, token: int, position: int, sequence: int, has_logits: bool) -> None:
        """Adds a token."""
        batch, i = self.batch, self.batch.n_tokens
        batch.token[i] = token
        batch.pos[i] = position
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence
        batch.logits[i] = has_logits
        batch.n_tokens = i + 1


class Engine:
    """Continuous batching: a place that a request leaves is the next one's in the next step."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._vocab_size = job.config()["vocab_size"]
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            bytes(_file(job)), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = job.max_model_len * job.max_num_seqs
        params.n_seq_max = job.max_num_seqs
        params.n_batch = max(2048, job.max_model_len + job.max_num_seqs)
        params.n_threads = params.n_threads_batch = job.num_threads
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.kv_unified = False  # as its header advises where sequences share nothing
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._batch = Batch(params.n_batch)

    def run(self) -> Answer:
        """Serves the workload once."""
        job = self._job
        memory = llama_cpp.llama_get_memory(self._context)
        waiting = collections.deque(range(len(job.prompts)))
        running: dict[int, int] = {}  # by place, the request
        free = list(range(job.max_num_seqs))
        tokens: list[list[int]] = [[] for _ in job.prompts]
        while waiting or running:
            self._batch.batch.n_tokens = 0
            places = list(running)
            for place in places:
                request = running[place]
                position = len(job.prompts[request]) + len(tokens[request]) - 1
                self._batch.add(tokens[request][-1], position, place, True)
            places += self._admit(waiting, running, free)
            for place, token in zip(places, self._step(len(places)), strict=True):
                request = running[place]
                tokens[request].append(token)
                if len(tokens[request]) == job.num_output_tokens[request]:
                    llama_cpp.llama_memory_seq_rm(memory, place, -1, -1)
                    del running[place]
                    free.append(place)
        return {"tokens": tokens}

    def _admit(
        self, waiting: collections.deque[int], running: dict[int, int], free: list[int]
    ) -> list[int]:
        """Adds whole prompts to the batch as long as they fit; returns the places they take."""
        taken = []
        while waiting and free:
            prompt = self._job.prompts[waiting[0]]
            if len(prompt) > self._batch.room:
                break
            place = free.pop()
            running[place] = waiting.popleft()
            taken.append(place)
            for position, token in enumerate(prompt):
                self._batch.add(token, position, place, position == len(prompt) - 1)
        return taken

    def _step(self, num_outputs: int) -> list[int]:
        if llama_cpp.llama_decode(self._context, self._batch.batch):
            raise RuntimeError("llama_decode failed")
        pointer = llama_cpp.llama_get_logits(self._context)
        logits = np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (num_outputs, self._vocab_size)
        )
        found: list[int] = logits.argmax(axis=1).tolist()
        return found


def load(job: Job) -> dict[str, Callable[[], Answer]]:
    """Returns what serves the workload."""
    return {"run": Engine(job).run}


if __name__ == "__main__":
    main(load, convert)
