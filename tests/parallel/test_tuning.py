"""The table of algorithms by size: how it is chosen, kept, read, and that every choice gives the same results."""

import json
from dataclasses import astuple, replace

import pytest
import torch
import torch.distributed as dist

from torch_sluice.cli import main
from torch_sluice.parallel import tune, tuning
from torch_sluice.parallel.tuning import NEVER, Tuning

SMALL = tune.Question("flat", (1, 2, 4), ("all_reduce",), serves_small=True)
LARGE = tune.Question("direct", (1, 2, 4), ("all_gather",))
ONES = dict.fromkeys(("flat", "piece", "direct", "direct_send", "streaming", "buffer_streaming"), 1)
EXAMPLE = Tuning(flat=1 << 14, piece=1 << 18, direct=NEVER, direct_send=NEVER, streaming=1 << 22, buffer_streaming=0)


@pytest.mark.parametrize(
    ("question", "gains", "expected"),
    [
        (SMALL, [2, 2, 0.5], 2),
        (SMALL, [2, 2, 2], 4),
        (SMALL, [0.5, 0.9, 0.9], 0),
        (SMALL, [0.9, 2, 0.5], 2),
        (SMALL, [1.001, 1.001, 1.001], 0),
        (LARGE, [0.5, 2, 2], 2),
        (LARGE, [2, 2, 2], 1),
        (LARGE, [2, 0.9, 0.9], 1),
        (LARGE, [0.5, 0.5, 0.5], NEVER),
        (LARGE, [0.5, 0.5, 3], 4),
    ],
)
def test_threshold_is_where_all_sizes_together_are_fastest(question, gains, expected):
    without = dict.fromkeys(question.sizes, 1.0)
    used = {size: 1 / gain for size, gain in zip(question.sizes, gains, strict=True)}
    assert tune.choose_threshold(question, without, used) == expected


def test_file_keeps_what_it_had_of_other_machines_and_numbers_of_ranks(tmp_path):
    path = tmp_path / "folder" / "comm.json"
    tuning.save_tunings(path, {2: EXAMPLE})
    content = json.loads(path.read_text())
    content["another machine"] = {"2": {"piece": 1}}
    path.write_text(json.dumps(content))
    tuning.save_tunings(path, {4: replace(EXAMPLE, flat=0)})
    assert tuning.load_tunings(path) == {2: EXAMPLE, 4: replace(EXAMPLE, flat=0)}
    assert json.loads(path.read_text())["another machine"] == {"2": {"piece": 1}}
    assert [each.name for each in path.parent.iterdir()] == ["comm.json"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "Expecting"),
        ("[]", "list"),
        ('{"two": {}}', "two"),
        ('{"0": {}}', "0 ranks, expected 1 to 1024"),
        ('{"2": {"flat": 1}}', "an entry has flat, expected flat, piece"),
        (json.dumps({"2": ONES | {"flat": -1}}), "flat is -1"),
        (json.dumps({"2": ONES | {"piece": "1"}}), "piece is '1'"),
    ],
)
def test_file_that_is_none_is_warned_of_and_changes_nothing(tmp_path, monkeypatch, content, problem):
    path = tmp_path / "comm.json"
    whole = content if content[0] == "[" or content == "{" else json.dumps({tuning.machine_name(): json.loads(content)})
    path.write_text(whole)
    with pytest.raises(ValueError, match=f"is not a file of 'torch-sluice tune-comm'.*{problem}"):
        tuning.load_tunings(path)
    monkeypatch.setenv("SLUICE_COMM_TUNING", str(path))
    with pytest.warns(UserWarning, match="process groups use the default sizes"):
        tuning.apply_tunings(None)


def test_backend_is_told_what_the_file_says(tmp_path, monkeypatch):
    class Library:
        calls = []  # noqa: RUF012

        def sluice_c10d_set_tuning(self, *arguments):
            self.calls.append(arguments)

    path = tmp_path / "comm.json"
    tuning.save_tunings(path, {2: EXAMPLE})
    monkeypatch.setenv("SLUICE_COMM_TUNING", "off")
    tuning.apply_tunings(Library())
    assert Library.calls == []
    monkeypatch.setenv("SLUICE_COMM_TUNING", str(path))
    tuning.apply_tunings(Library())
    assert Library.calls == [(2, *astuple(EXAMPLE))]
    monkeypatch.delenv("SLUICE_COMM_TUNING")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tuning.tuning_path() == tmp_path / "torch_sluice" / "comm.json"
    assert tuning.load_tunings(tuning.tuning_path()) == {}


def collectives_under(chosen):
    from torch_sluice.parallel.backend import load_library

    library = load_library()
    rank, size = dist.get_rank(), dist.get_world_size()
    tuning.set_tuning(library, size, chosen)
    group = dist.new_group()
    library.sluice_c10d_clear_tunings()
    for count in (3, 5000, 300_001):
        tensor = torch.arange(count, dtype=torch.float32) * (rank + 1)
        total = torch.arange(count, dtype=torch.float32) * (size * (size + 1) // 2)
        reduced = tensor.clone()
        dist.all_reduce(reduced, group=group)
        assert torch.equal(reduced, total)
        gathered = [torch.empty(count) for _ in range(size)]
        dist.all_gather(gathered, tensor, group=group)
        for other in range(size):
            assert torch.equal(gathered[other], torch.arange(count, dtype=torch.float32) * (other + 1))
        part = torch.empty(count)
        dist.reduce_scatter(part, [tensor * (i + 1) for i in range(size)], group=group)
        assert torch.equal(part, total * (rank + 1))
        received = torch.empty(count)
        works = [
            dist.isend(tensor, (rank + 1) % size, group=group),
            dist.irecv(received, (rank - 1) % size, group=group),
        ]
        for work in works:
            work.wait()
        assert torch.equal(received, gathered[rank - 1])
    dist.destroy_process_group(group)


@pytest.mark.parametrize(
    "change",
    [
        {"flat": 0},
        {"flat": NEVER},
        {"piece": 1},
        {"piece": NEVER},
        {"direct": 0, "direct_send": 0},
        {"direct": NEVER, "direct_send": NEVER},
        {"streaming": 0, "buffer_streaming": 0},
        {"streaming": NEVER, "buffer_streaming": NEVER},
    ],
    ids=str,
)
def test_every_choice_gives_the_same_results(ranks, change):
    ranks(3).run(collectives_under, replace(tuning.default_tuning(3), **change))


def test_command_measures_and_keeps(tmp_path, capsys):
    path = tmp_path / "comm.json"
    assert main(["tune-comm", "--ranks", "2", "--rounds", "1", "--out", str(path)]) == 0
    assert set(tuning.load_tunings(path)) == {2}
    assert "every rank reduces" in capsys.readouterr().out


def test_command_refuses_what_it_cannot_measure(capsys):
    assert main(["tune-comm", "--ranks", "1"]) == 2
    assert "--ranks is 1, expected numbers from 2 to 64" in capsys.readouterr().err
    assert main(["tune-comm", "--rounds", "0"]) == 2
    assert "--rounds is 0, expected 1 or more" in capsys.readouterr().err
