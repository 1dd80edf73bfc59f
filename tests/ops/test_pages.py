"""The examples of the pages about each part run."""

import re

import pytest
from support.devices import INDUCTOR

EXAMPLES = {"attention": 7, "gate": 2, "accumulate": 2, "infer": 2, "plan": 1, "plan_simulator": 1}


def examples(repository, page):
    return re.findall(r"```python\n(.*?)```", (repository / f"docs/{page}.md").read_text(), re.S)


def run(repository, page, number=0, names=None):
    names = {} if names is None else names
    exec(compile(examples(repository, page)[number], f"docs/{page}.md, example {number}", "exec"), names)
    return names


@pytest.mark.parametrize("number", range(EXAMPLES["attention"]))
def test_attention(repository, number, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese import GPTNeoXJapaneseAttention

    monkeypatch.setattr(GPTNeoXJapaneseAttention, "_attn", GPTNeoXJapaneseAttention._attn)  # one example marks it
    monkeypatch.chdir(tmp_path)
    run(repository, "attention", number)


def test_plan(repository, capsys):
    plan = run(repository, "plan")["plan"]
    assert "torchrun" in capsys.readouterr().out
    assert plan.layout.dp * plan.layout.tp * plan.layout.pp * plan.layout.cp == 64


def test_plan_simulator(repository, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert run(repository, "plan_simulator")["step"].makespan_s > 0


def test_gate(repository):
    pytest.importorskip("transformers")
    controller = run(repository, "gate")["controller"]
    assert controller.count == controller.steps == 4
    assert controller.target_density == 0.25
    assert 0 < controller.density <= 1
    assert controller.phase == "hard"


def test_accumulate(repository, capsys):
    run(repository, "accumulate")
    steps, share = capsys.readouterr().out.split()
    assert int(steps) == 4
    assert 0 < float(share) <= 1
    run(repository, "accumulate", 1)
    assert capsys.readouterr().out.split() == ["4", "12"]


def test_all_examples_are_run(repository):
    assert {page: len(examples(repository, page)) for page in EXAMPLES} == EXAMPLES


def test_infer(repository, capsys, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    names = run(repository, "infer")
    assert names["small"].compression_report.kept >= 0.9
    assert "latency, median" in capsys.readouterr().out
    x = names["data"][0][0]
    with names["torch"].no_grad():
        assert names["torch"].equal(names["again"](x), names["small"](x))


@INDUCTOR
def test_infer_compiled_ahead(repository, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    names = run(repository, "infer", 1, run(repository, "infer"))
    x = names["data"][0][0][:1]
    with names["torch"].no_grad():
        names["torch"].testing.assert_close(names["run"](x), names["small"](x))
