"""Tokenizers and chat templates from folders."""

import json
import socket
from pathlib import Path

import pytest

from pallas_paged.engine.detokenizer import Detokenizer
from pallas_paged.engine.tokenizer import load_tokenizer, require_tokenizer
from tests.engine import small_tokenizers

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "{{ bos_token }}{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


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
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
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
    detokenizer = Detokenizer(tokenizer)
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


def test_broken_files(folder):
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"cannot load the tokenizer of {folder}: "):
        load_tokenizer(folder)


def test_code_in_the_folder_is_not_run(folder):
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(folder)


def test_chat(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.apply_chat_template([{"role": "system", "content": "be brief"}, *HELLO])
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<s>system: be brief\n<s>user: hello\nassistant:"  # no second <s> in front
    ids = tokenizer.apply_chat_template(HELLO, add_generation_prompt=False)
    assert tokenizer.decode(ids) == "user: hello\n"


def test_a_template_of_the_callers(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    ids = load_tokenizer(folder).apply_chat_template(HELLO, chat_template="{{ messages | length }}")
    assert load_tokenizer(folder).decode(ids) == "1"


def test_a_template_in_its_own_file(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.apply_chat_template(HELLO)) == "hello!"


def test_no_chat_template(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no chat template .*send the prompt as text"):
        load_tokenizer(folder).apply_chat_template(HELLO)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        (HELLO[0], "at least one message"),
        (["hello"], r"messages\[0\]='hello' must be a mapping"),
        ([*HELLO, {"role": "user"}], r"messages\[1\]=.* must be a mapping"),
        ([{"role": "critic", "content": "bad"}], "does not accept these messages: no critics"),
    ],
)
def test_messages_that_make_no_prompt(folder, messages, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder).apply_chat_template(messages)
