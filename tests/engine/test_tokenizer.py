"""Tokenizers from folders."""

import contextlib
import json
import logging
import shutil
import socket
from pathlib import Path

import pytest
import sentencepiece

from pallas_paged.engine.text.tokenizer import (
    known_eos_token_ids,
    load_tokenizer,
    require_tokenizer,
)
from tests.engine import small_tokenizers


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a tokenizer must not need the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the two files that every published model has, and no config.json."""
    small_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_text_to_tokens_and_back(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("the fox 😀")
    assert ids == small_tokenizers.byte_level().encode("the fox 😀").ids
    assert ids[0] == small_tokenizers.byte_level().token_to_id("<s>")  # the post-processor's
    assert tokenizer.decode(ids) == "the fox 😀"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>the fox 😀"
    assert tokenizer.eos_token_id == small_tokenizers.byte_level().token_to_id("</s>")
    assert tokenizer.vocab_size == 330
    assert tokenizer.decode([330, 100_000]) == ""
    detokenizer = tokenizer.detokenizer()
    assert "".join(detokenizer.append(token) for token in ids) == "the fox 😀"


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize(
    "kind",
    [small_tokenizers.byte_level, small_tokenizers.byte_fallback],
    ids=lambda kind: kind.__name__,
)
def test_the_file_decides_whatever_the_model(tmp_path, kind, model_type):
    """transformers has a tokenizer class for some model types, with its own way of splitting."""
    kind().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = " Hello  wörld\n\n你好"
    assert load_tokenizer(tmp_path).encode(text) == kind().encode(text).ids


def test_a_tokenizer_file_alone_is_enough(tmp_path):
    small_tokenizers.metaspace().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    assert tokenizer.eos_token_id is None


def test_opt_files(tmp_path):
    """OPT's folders have no tokenizer.json, and their config asks for </s> in front."""
    small_tokenizers.byte_level().model.save(str(tmp_path))  # vocab.json, merges.txt
    config = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "add_bos_token": True}
    config["tokenizer_class"] = "GPT2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("the fox 😀")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "</s>the fox 😀"
    assert tokenizer.eos_token_id == small_tokenizers.byte_level().token_to_id("</s>")


def test_no_tokenizer_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(ValueError, match=r"has no tokenizer files \(tokenizer.json.*token_ids"):
        require_tokenizer(None, tmp_path)


def test_not_a_folder(tmp_path):
    with pytest.raises(ValueError, match="must be a folder; it does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must be a folder"):
        load_tokenizer("gpt2")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a folder; it is a file"):
        load_tokenizer(tmp_path / "file")
    with pytest.raises(ValueError, match="tokenizer=3 must be the name of a folder"):
        load_tokenizer(3)


def test_broken_files(folder):
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=f"cannot load the tokenizer of {folder} from tokenizer.json: "
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "field",
    [{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, {"model": {}}],
)
def test_damaged_files(folder, field):
    """The first one's error is a panic of Rust code, which is no Exception."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(whole | field))
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(folder)


def test_a_panic_while_splitting_is_translated(folder):
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["post_processor"]["special_tokens"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"cannot split it: no entry|cannot load"):
        load_tokenizer(folder).encode("the")


def test_code_in_the_folder_is_not_run(folder):
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud800", r"the text holds '\\ud800' at character 1, half of a surrogate pair"),
        ("\udcff", r"the text holds '\\udcff' at character 0"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused(folder, text, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder).encode(text)


def test_what_a_tokenizer_cannot_split_is_said(tmp_path):
    small_tokenizers.words().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot split it: .*UNK"):
        tokenizer.encode("the cat")


def test_a_long_text_is_no_news(folder, caplog):
    config = {"model_max_length": 8}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING), _propagating("transformers"):
        assert len(load_tokenizer(folder).encode("the fox " * 20)) > 8
    assert not caplog.records


def test_texts_of_single_tokens_are_those_of_decoding_them(folder):
    tokenizer = load_tokenizer(folder)
    for _ in range(2):
        for token in [*range(tokenizer.vocab_size), 999]:
            alone = tokenizer.implementation.decode([token], skip_special_tokens=False)
            assert tokenizer.decode_token(token) == alone


@pytest.mark.parametrize("kind", small_tokenizers.KINDS, ids=lambda kind: kind.__name__)
def test_streamed_text_is_the_whole_whatever_the_folder_cleans_up(tmp_path, kind):
    """transformers' cleanup looks at what stands around a space, across tokens."""
    kind().save(str(tmp_path / "tokenizer.json"))
    config = {
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("the fox do n't , I 'm . the dog 's ! ?", add_special_tokens=False)
    whole = tokenizer.decode(ids)
    assert whole == kind().decode(ids)
    detokenizer = tokenizer.detokenizer()
    pieces = [*(detokenizer.append(token) for token in ids), detokenizer.finish()]
    assert "".join(pieces) == whole
    assert "".join(pieces[:4]) == tokenizer.decode(ids[:4])


def test_nothing_stays_on_loggers_of_others(folder):
    before = list(logging.getLogger("transformers").filters)
    load_tokenizer(folder)
    load_tokenizer(folder)
    assert logging.getLogger("transformers").filters == before


def test_eos_tokens_that_are_none_are_left_out(folder, caplog):
    tokenizer = load_tokenizer(folder)
    eos = tokenizer.eos_token_id
    assert known_eos_token_ids((7,), tokenizer, 330) == (7, eos)
    assert known_eos_token_ids((7,), None, 330) == (7,)
    assert not caplog.records
    tokenizer.eos_token_id = 330
    assert known_eos_token_ids((7, -1), tokenizer, 330) == (7,)
    assert "eos_token_id=-1, 330 is outside the model's vocabulary of 330" in caplog.text


@pytest.mark.parametrize("file", ["spiece.model", "vocab.txt", "vocab.json"])
@pytest.mark.parametrize("model_type", ["qwen2", "llama", None])
def test_files_that_transformers_leaves_out_are_no_empty_tokenizer(tmp_path, file, model_type):
    """It makes one with no tokens but special ones, without a word."""
    (tmp_path / file).write_text("{}" if file == "vocab.json" else "")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=rf"cannot load the tokenizer of .* from {file}"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> Path:
    """A model of the kind that Llama's and Mistral's are."""
    file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    with open(file, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(small_tokenizers.CORPUS * 3).split("\n")),
            model_writer=writer,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return file


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("has_class", [True, False])
def test_a_sentencepiece_model_alone_is_enough(
    tmp_path, sentencepiece_model, model_type, has_class
):
    shutil.copy(sentencepiece_model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if has_class:
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    for text in ("Hello world", "the fox 😀 你好\nnext", "def main():\n    return None"):
        ids = tokenizer.encode(text)
        assert ids == [reference.bos_id(), *reference.encode(text)]
        assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (400, reference.eos_id())


def test_a_folder_may_ask_for_no_bos(tmp_path, sentencepiece_model):
    shutil.copy(sentencepiece_model, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the") == tokenizer.encode("the", add_special_tokens=False)


def test_a_sentencepiece_model_that_transformers_misreads_is_refused(tmp_path, sentencepiece_model):
    shutil.copy(sentencepiece_model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"splits 'Hello world' in another way than sentencepiece"):
        load_tokenizer(tmp_path)


def test_a_damaged_sentencepiece_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x00 nonsense")
    with pytest.raises(ValueError, match=r"cannot load the tokenizer of .* from tokenizer.model"):
        load_tokenizer(tmp_path)


@contextlib.contextmanager
def _propagating(name):
    """transformers prints by itself; a test sees what reaches the root logger."""
    logger = logging.getLogger(name)
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before
