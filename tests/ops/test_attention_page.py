"""The examples of docs/attention.md run."""

import re

import pytest


def examples(repository):
    return re.findall(r"```python\n(.*?)```", (repository / "docs/attention.md").read_text(), re.S)


@pytest.mark.parametrize("number", range(3))
def test_example(repository, number):
    pytest.importorskip("transformers")
    exec(compile(examples(repository)[number], f"docs/attention.md, example {number}", "exec"), {})


def test_all_examples_are_run(repository):
    assert len(examples(repository)) == 3
