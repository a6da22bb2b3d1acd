"""The README's Python examples run as they stand."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("source", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(source, str(README), "exec"), {"__name__": "readme"})


def test_the_guide_to_a_new_model_shows_the_code_as_it_is() -> None:
    models = README.parent / "models"
    shown = re.findall(r"```python\n(.*?)```", (models / "README.md").read_text(), flags=re.DOTALL)
    sources = [file.read_text() for file in models.glob("*.py")]
    assert len(shown) >= 4
    for block in shown:
        assert any(block in source for source in sources), block
