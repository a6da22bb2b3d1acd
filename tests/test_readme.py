"""The Python examples in the READMEs run as they stand."""

import pathlib
import re
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = [
    pytest.param(source, id=f"{path.relative_to(ROOT)}-{i}")
    for path in (ROOT / "README.md", ROOT / "pallas_paged/README.md")
    for i, source in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


def test_the_readmes_have_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("source", EXAMPLES)
def test_example_runs(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})


def test_the_guide_to_a_new_model_shows_the_code_as_it_is() -> None:
    guide = (ROOT / "models/README.md").read_text()
    shown = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    sources = [file.read_text() for file in (ROOT / "models").glob("*.py")]
    assert len(shown) >= 4
    for block in shown:
        assert any(block in source for source in sources), block


def test_the_page_on_training_loops_shows_the_program_as_it_is() -> None:
    page = (ROOT / "engine/README.md").read_text()
    shown = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    files = ("benchmarks/grpo.py", "benchmarks/grpo_loop.py")
    source = "\n".join((ROOT / file).read_text() for file in files)
    assert len(shown) >= 3
    for block in shown:
        assert block in source or textwrap.indent(block, "    ") in source, block
    assert "\ndef grpo(" in "".join(shown)
