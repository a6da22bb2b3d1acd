"""The formats in which models write calls of tools, as data."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes a call: a JSON object with a name and arguments.

    Attributes:
      name: of the format.
      opening: the marker in front of a call.
      closing: the marker behind it, if there is one.
      is_bare: whether a call needs no marker where an answer begins, and behind another call.
      between: what is written between two calls.
      padding: what is written between a marker and the object.
      arguments_keys: keys that the arguments may have in the object, the usual one first.
      other_keys: what else may be in an object before it is known to be a call; None: anything.
      needs_arguments: whether an object without arguments is no call, instead of one with `{}`.
      end_markers: special tokens that end an answer or a turn; with skip_special_tokens=False they
        are in the text, and are to be left out of it. "</s>" is none of them, as it is HTML too.
    """

    name: str
    opening: str
    closing: str | None
    is_bare: bool
    between: str
    padding: str
    arguments_keys: tuple[str, ...]
    other_keys: frozenset[str] | None
    needs_arguments: bool
    end_markers: frozenset[str]

    @property
    def markers(self) -> tuple[str, ...]:
        """What must be in the text, so that skip_special_tokens=False where one is special."""
        return (self.opening,) if self.closing is None else (self.opening, self.closing)


HERMES = ToolFormat(
    name="hermes",
    opening="<tool_call>",
    closing="</tool_call>",
    is_bare=False,
    between="\n",
    padding="\n",
    arguments_keys=("arguments",),
    other_keys=None,
    needs_arguments=False,
    end_markers=frozenset(
        {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>"}
    ),
)
"""Hermes, Qwen2.5, Qwen3: `<tool_call>` around an object with "name" and "arguments"."""

LLAMA3_JSON = ToolFormat(
    name="llama3_json",
    opening="<|python_tag|>",
    closing=None,
    is_bare=True,
    between="; ",
    padding="",
    arguments_keys=("parameters", "arguments"),
    # An answer that is JSON is given out as soon as one of its keys shows that it is no call.
    other_keys=frozenset({"type", "id"}),
    needs_arguments=True,
    end_markers=frozenset(
        {
            *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
            *("<|start_header_id|>", "<|end_header_id|>"),
        }
    ),
)
"""Llama 3.1 to 3.3: an object with "name" and "parameters", which is the whole answer."""

TOOL_PARSERS = {known.name: known for known in (HERMES, LLAMA3_JSON)}
"""The formats by the names that a user gives them."""

_MARKERS_OF_OTHERS = ("<function=", "<arg_key>", "<|tool_call|>", "[TOOL_CALLS]")
_LLAMA3_SIGNS = re.compile(r'python_tag|ipython|"name":[^{}\n]*"parameters":')


def choose_format(chat_template: str | None) -> ToolFormat | None:
    """Returns the format that a chat template teaches, None if it is none of those above.

    Qwen3-Coder and GLM have the markers of Hermes around calls that are no JSON: none of those.
    """
    if chat_template is None or any(marker in chat_template for marker in _MARKERS_OF_OTHERS):
        return None
    if HERMES.opening in chat_template:
        return HERMES
    return LLAMA3_JSON if _LLAMA3_SIGNS.search(chat_template) else None
