"""From messages to text, over folders with templates of all kinds."""

import json
from pathlib import Path

import pytest

from pallas_paged.engine.text.tokenizer import load_tokenizer
from tests.engine import small_tokenizers

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "{{ bos_token }}{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LOOPING = (
    "{%- for message in messages -%}"
    "{%- for part in message['content'] -%}[{{ part.text }}]{%- endfor -%}"
    "{%- endfor -%}"
)
HELLO = [{"role": "user", "content": "hello"}]
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


@pytest.fixture
def folder(tmp_path) -> Path:
    small_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_chat(folder):
    tokenizer = load_tokenizer(folder)
    text = tokenizer.render_chat([{"role": "system", "content": "be brief"}, *HELLO])
    assert text == "<s>system: be brief\n<s>user: hello\nassistant:"
    text = tokenizer.render_chat(HELLO, add_generation_prompt=False)
    assert text == "<s>user: hello\n"


def test_a_template_of_the_callers(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render_chat(HELLO, chat_template="{{ messages | length }}") == "1"


def test_a_template_in_its_own_file(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render_chat(HELLO) == "hello!"
    assert tokenizer.render_chat(HELLO, chat_template="default") == "hello!"


def test_no_chat_template(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no chat template .*send the prompt as text"):
        load_tokenizer(folder).render_chat(HELLO)
    with pytest.raises(ValueError, match=r"chat_template='rag' is neither .*: it has none"):
        load_tokenizer(folder).render_chat(HELLO, chat_template="rag")


def named(folder: Path, way: str, names: tuple[str, ...]) -> None:
    """Gives the folder templates that write their names, in one of the two ways there are."""
    config = {}
    if way == "config":
        config = {"chat_template": [{"name": n, "template": f"{{{{ '{n}' }}}}"} for n in names]}
    else:
        (folder / "additional_chat_templates").mkdir()
        for name in names:
            default = name == "default"
            file = "chat_template.jinja" if default else f"additional_chat_templates/{name}.jinja"
            (folder / file).write_text(f"{{{{ '{name}' }}}}")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("way", ["config", "files"])
def test_a_name_chooses_a_template(folder, way):
    named(folder, way, ("default", "tool_use", "rag"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render_chat(HELLO) == "default"
    assert tokenizer.render_chat(HELLO, tools=[{"type": "function"}]) == "tool_use"
    for name in ("default", "tool_use", "rag"):
        assert tokenizer.render_chat(HELLO, chat_template=name) == name
    assert tokenizer.render_chat(HELLO, chat_template="{{ 1 }}") == "1"
    with pytest.raises(ValueError, match="its templates are default, rag, tool_use"):
        tokenizer.render_chat(HELLO, chat_template="tools")


@pytest.mark.parametrize("way", ["config", "files"])
def test_none_of_several_templates_is_the_default(folder, way):
    named(folder, way, ("rag", "tool_use"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render_chat(HELLO, tools=[]) == "tool_use"
    with pytest.raises(ValueError, match=r"no default chat template; name one .*rag, tool_use"):
        tokenizer.render_chat(HELLO)


@pytest.mark.parametrize("way", ["config", "files"])
def test_an_only_template_is_taken_whatever_its_name(folder, way):
    named(folder, way, ("tool_use",))
    assert load_tokenizer(folder).render_chat(HELLO) == "tool_use"


def test_text_parts_are_joined_for_templates_that_expect_a_string(folder):
    messages = [{"role": "user", "content": PARTS}]
    assert load_tokenizer(folder).render_chat(messages) == "<s>user: one\ntwo\nassistant:"
    assert messages[0]["content"] is PARTS


@pytest.mark.parametrize(
    "template",
    [
        LOOPING,
        LOOPING.replace("message['content']", "message.content"),
        LOOPING.replace("message['content']", "messages[0].content"),
        LOOPING.replace("message['content']", "message.content if part.type == 'text'"),
        LOOPING.replace("message['content']", "message.content | selectattr('type', 'eq', 'text')"),
        LOOPING.replace(
            "{%- for part in message['content'] -%}",
            "{%- set content = message.content %}{% for part in content %}",
        ),
    ],
)
def test_templates_that_loop_over_the_parts_get_them(folder, template):
    text = load_tokenizer(folder).render_chat(
        [{"role": "user", "content": PARTS}], chat_template=template
    )
    assert text == "[one][two]"


def test_a_loop_over_the_lines_of_a_string_is_none_over_parts(folder):
    template = "{% for line in messages[0].content.split('\n') %}[{{ line }}]{% endfor %}"
    text = load_tokenizer(folder).render_chat(
        [{"role": "user", "content": PARTS}], chat_template=template
    )
    assert text == "[one][two]"


def add(a: int, b: int) -> int:
    """
    Adds.

    Args:
        a: one.
        b: two.
    """
    return a + b


def test_tools_and_variables_reach_the_template(folder):
    tokenizer = load_tokenizer(folder)
    template = "{{ tools[0].function.name }} {{ thinking }} {{ documents | length }}"
    text = tokenizer.render_chat(
        HELLO,
        chat_template=template,
        tools=[add],
        chat_template_kwargs={"thinking": False, "documents": [{"title": "t", "text": "x"}]},
    )
    assert text == "add False 1"
    schema = {"type": "function", "function": {"name": "f"}}
    text = tokenizer.render_chat(
        HELLO, chat_template="{{ tools[0].function.name }}", tools=[schema]
    )
    assert text == "f"
    called = [*HELLO, {"role": "assistant", "tool_calls": [schema]}]
    assert "assistant: " in tokenizer.render_chat(called)


def test_the_last_message_is_continued(folder):
    tokenizer = load_tokenizer(folder)
    messages = [*HELLO, {"role": "assistant", "content": "I am"}]
    text = tokenizer.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "<s>user: hello\n<s>assistant: I am"
    with pytest.raises(ValueError, match=r"continue_final_message=True .*add_generation_prompt"):
        tokenizer.render_chat(messages, continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].x.y }}", "has no attribute 'x'"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{{ raise_exception('not so') }}", "not so"),
        ("{% for", "unexpected 'end of template'"),
        ("{% include 'x' %}", "TypeError: no loader"),
        ("{{ range(10**9) | list }}", "OverflowError"),
        ("{{ strftime_now(3) }}", "TypeError: strftime"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_whatever_a_template_raises_is_a_value_error(folder, template, message):
    with pytest.raises(
        ValueError, match=rf"chat_template=.* does not accept these messages: .*{message}"
    ):
        load_tokenizer(folder).render_chat(HELLO, chat_template=template)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=rf"the chat template of {folder} does not .*{message}"):
        load_tokenizer(folder).render_chat(HELLO)


def test_a_template_that_makes_no_text(folder):
    with pytest.raises(ValueError, match="the text that the chat template makes of messages holds"):
        load_tokenizer(folder).render_chat(HELLO, chat_template="{{ '\\ud800' }}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        (None, "messages=None must be a list of at least one message"),
        (3, "at least one message"),
        (HELLO[0], "at least one message"),
        (["hello"], r"messages\[0\]='hello' must be a mapping"),
        ([*HELLO, {"role": "user"}], r"messages\[1\]=.* has no \"content\""),
        ([{"role": "user", "content": None}], r"messages\[0\]=.* has no \"content\""),
        ([{"content": "a"}], r"messages\[0\]=.* must be a mapping with \"role\""),
        ([{"role": 1, "content": "a"}], r"messages\[0\]=.* the role a string"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\['content'\]=3 must be a string or"),
        (
            [{"role": "user", "content": "a\ud800"}],
            r"messages\[0\]\['content'\] holds '\\ud800' at character 1",
        ),
        (
            [{"role": "user", "content": [*PARTS, {"type": "image_url", "image_url": "x"}]}],
            r"messages\[0\]\['content'\]\[2\] is of type 'image_url'; models here read text only",
        ),
        (
            [{"role": "user", "content": ["one"]}],
            r"messages\[0\]\['content'\]\[0\]='one' must be \{\"type\": \"text\"",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "\udcff"}]}],
            r"messages\[0\]\['content'\]\[0\] holds '\\udcff'",
        ),
        ([{"role": "critic", "content": "bad"}], "does not accept these messages: no critics"),
    ],
)
def test_messages_that_make_no_prompt(folder, messages, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder).render_chat(messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template": 3}, "chat_template=3 must be a string or None"),
        ({"chat_template": "tool_use"}, "chat_template='tool_use' is neither .* are default$"),
        ({"chat_template": ""}, "chat_template='' is neither"),
        ({"add_generation_prompt": 1}, "add_generation_prompt=1 must be True or False"),
        ({"continue_final_message": "content"}, "continue_final_message='content' must be True"),
        ({"tools": "add"}, "tools='add' must be a list of JSON schemas or functions"),
        ({"tools": [add, 3]}, r"tools\[1\]=3 must be a JSON schema or a function"),
        ({"tools": [lambda x: x]}, "does not accept these messages: .*docstring"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs=3 must be a mapping of names"),
        ({"chat_template_kwargs": {1: 2}}, "must be a mapping of names"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs holds 'tokenize'"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs holds 'messages'"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder).render_chat(HELLO, **options)
