"""A folder of the demo model that can chat: with a chat template, tools and reasoning."""

import json
import shutil
from pathlib import Path

DEMO = Path(__file__).parents[3] / "models/demo"

TEMPLATE = """\
{{ bos_token }}
{%- if tools %}[tools]
{% for tool in tools %}{{ tool.function | tojson }}
{% endfor %}Call one: <tool_call>{"name": ..., "arguments": ...}</tool_call>
{% endif %}
{%- for message in messages %}[{{ message.role }}]
{{ message.content or '' }}{% for call in message.tool_calls or [] %}<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
</tool_call>{% endfor %}{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}[assistant]
{% if think %}<think>
{% endif %}{% endif %}"""
"""The variable `think` makes an answer begin inside of reasoning."""
END_OF_THINKING = 2047
"""The token `</think>`; a special one, which a parser needs in the text."""


def chat_folder(folder: Path) -> Path:
    """Writes it into an empty folder, and returns that.

    The tokenizer's last token becomes `</think>`, so that a bias makes the model stop to think.
    """
    for file in DEMO.iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    _change(folder / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    _change(folder / "tokenizer.json", _replace_last_token)
    return folder


def _replace_last_token(tokenizer: dict) -> None:
    model, tag = tokenizer["model"], "</think>"
    (last,) = (text for text, token in model["vocab"].items() if token == END_OF_THINKING)
    del model["vocab"][last]
    model["vocab"][tag] = END_OF_THINKING
    *model["merges"], merge = model["merges"]
    assert "".join(merge) == last
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {"id": END_OF_THINKING, "content": tag, "special": True}
    tokenizer["added_tokens"].append(added | flags)


def _change(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
