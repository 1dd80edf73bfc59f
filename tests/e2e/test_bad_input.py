"""Mistakes of the user: one line that names the argument, its value and what to do, and exit code 2."""

import copy
import json
import os
import re
import resource
import socket
import sys

import pytest
import torch
from support.training import SMALL, TINY

from torch_sluice.cli import main
from torch_sluice.train.checkpoint import load_checkpoint, save_checkpoint
from torch_sluice.train.errors import TrainError
from torch_sluice.train.main import start_run
from torch_sluice.train.settings import PRESETS, most_threads, window_density


@pytest.fixture
def refused(capsys):
    """Runs the command in this process and returns the one line that it refused with."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("torch-sluice: error: ")
        return lines[0]

    return run


def test_missing_data(refused, tmp_path):
    message = refused("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert f"--data is '{tmp_path / 'nowhere'}', and there is no such file or folder" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_empty_data(refused, tmp_path, content):
    (tmp_path / "text").write_bytes(content)
    assert "is empty" in refused("train", "--data", tmp_path / "text", "--out", tmp_path / "out")


@pytest.mark.parametrize(("content", "position"), [(b"good text \xff and more", 10), (b"zero\0byte", 4)])
def test_data_that_is_not_text(refused, tmp_path, content, position):
    (tmp_path / "text").write_bytes(content)
    message = refused("train", "--data", tmp_path / "text", "--out", tmp_path / "out")
    assert f"not UTF-8 text (byte {position} " in message


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_data_that_has_no_end(refused, tmp_path, kind):
    path = tmp_path / "data"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    message = refused("train", "--data", path, "--out", tmp_path / "out")
    assert f"--data is '{path}', which is neither a file nor a folder" in message


def test_folder_without_text(refused, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "picture").write_bytes(b"\x89PNG\xff\0")
    message = refused("train", "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert "no UTF-8 text file in it (1 files passed over)" in message


def test_too_little_text_for_the_context(refused, tmp_path):
    (tmp_path / "text").write_text("short text " * 20)
    message = refused("train", "--data", tmp_path / "text", "--out", tmp_path / "out", *TINY)
    assert "a context of 48 needs at least 50 of each" in message


def test_out_is_a_file(refused, tmp_path, text_folder):
    (tmp_path / "out").write_text("in the way")
    message = refused("train", "--data", text_folder, "--out", tmp_path / "out", *TINY)
    assert f"--out is '{tmp_path / 'out'}', where nothing can be written" in message
    assert (tmp_path / "out").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_is_read_only(refused, tmp_path, text_folder):
    (tmp_path / "out").mkdir(mode=0o500)
    message = refused("train", "--data", text_folder, "--out", tmp_path / "out", *TINY)
    assert "where nothing can be written: Permission denied" in message


def test_json_cannot_be_written(refused, tmp_path, text_folder):
    target = tmp_path / "missing" / "figures.json"
    message = refused("train", "--data", text_folder, "--out", tmp_path / "out", "--json", target, *TINY)
    assert f"--json is '{target}', which cannot be written" in message


def test_tensorboard_without_the_package(refused, tmp_path, text_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = refused("train", "--data", text_folder, "--out", tmp_path / "out", "--tensorboard", *TINY)
    assert "--tensorboard needs the package tensorboard: pip install tensorboard" in message


def test_metrics_port_in_use(refused, tmp_path, text_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused("train", "--data", text_folder, "--out", tmp_path, f"--metrics-port={port}", *TINY)
    assert f"--metrics-port is {port} on --metrics-host '127.0.0.1', where nothing can listen" in message


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--metrics-port=-1"], "--metrics-port is -1, expected an integer from 0 to 65535"),
        (["--metrics-host=127.0.0.1"], "--metrics-host is 127.0.0.1 without --metrics-port, expected both or none"),
    ],
)
def test_bad_metrics_options(refused, tmp_path, text_folder, options, text):
    assert text in refused("train", "--data", text_folder, "--out", tmp_path / "out", *options, *TINY)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--steps=0", "--steps is 0, expected at least 1"),
        ("--context=8", "--context is 8, expected at least 32 bytes"),
        ("--width=15", "--width is 15, expected an even multiple of --heads = 2"),
        ("--target-density=0", "--target-density is 0.0, expected a number in (0, 1]"),
        (
            "--local-window=40",
            "but the 40 keys of --local-window and the 4 sinks alone keep 0.99",
        ),
        ("--threads=-1", "--threads is -1, expected at least 1"),
        ("--learning-rate=nan", "--learning-rate is nan, expected a positive number"),
        ("--learning-rate=inf", "--learning-rate is inf, expected a positive number of at most 1000"),
        ("--gate-learning-rate=1e300", "--gate-learning-rate is 1e+300, expected a positive number of at most 1000"),
        ("--local-window=-1", "--local-window is -1, expected at least 0"),
        ("--seed=-1", "--seed is -1, expected at least 0"),
        ("--seed=18446744073709551616", "--seed is 18446744073709551616, expected at most 18446744073709551615"),
        (f"--seed={10**40}", f"--seed is {10**40}, expected at most 18446744073709551615"),
        ("--width=2048", "--width is 2048, expected at most 256 for each of --heads = 2"),
        ("--width=516", "--width is 516, expected at most 256 for each of --heads = 2"),
        ("--width=100000000", "--width is 100000000, expected at most 65536"),
        ("--heads=100000000", "--heads is 100000000, expected at most 4096"),
        ("--layers=1000000", "--layers is 1000000, expected at most 1024"),
        ("--steps=1000000000000", "--steps is 1000000000000, expected at most 1000000000"),
        ("--micro-size=1000000000", "--micro-size is 1000000000, expected at most 65536"),
        ("--micro-batches=1000000000", "--micro-batches is 1000000000, expected at most 65536"),
        (f"--local-window={10**30}", f"--local-window is {10**30}, expected at most 1048576"),
        ("--context=100000000", "--context is 100000000, expected at most 1048576 bytes"),
        ("--threads=100000", f"--threads is 100000, expected at most {most_threads()}; this machine has"),
    ],
)
def test_bad_settings(refused, tmp_path, text_folder, monkeypatch, option, text):
    monkeypatch.setattr("torch_sluice.train.main.load_corpus", None)  # it is refused before any work
    assert text in refused("train", "--data", text_folder, "--out", tmp_path / "out", *TINY, option)
    assert not (tmp_path / "out").exists()


def test_more_memory_than_the_machine_has(refused, tmp_path, text_folder, monkeypatch):
    monkeypatch.setattr("torch_sluice.train.main.load_corpus", None)
    greatest = ("--context=1048576", "--micro-size=65536", "--layers=1024", "--width=65536", "--heads=4096")
    message = refused("train", "--data", text_folder, "--out", tmp_path / "out", *TINY, *greatest)
    assert (
        "--context is 1048576, --micro-size is 65536, --micro-batches is 2, --layers is 1024, --width is 6" in message
    )
    assert re.search(
        r"that needs at least [\d.]+ GiB of memory, expected at most the [\d.]+ GiB of this machine$", message
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_memory_that_is_needed_at_least_is_that_and_not_more(preset):
    assert 2**26 < PRESETS[preset].least_bytes < 2**28  # the measured peaks of the sides add up to more


@pytest.mark.parametrize("context", [1, 5, 32, 100])
def test_density_of_a_window_is_that_of_its_pairs_counted_one_by_one(context):
    for window in (0, 1, 4, 99, 100, 200):
        for sinks in (0, 1, 4, 300):
            kept = sum(min(i, window) + min(sinks, max(i - window, 0)) for i in range(1, context + 1))
            assert window_density(context, window, sinks) == kept / (context * (context + 1) / 2)


def _fill_disk(path):
    """What is written to the path from now on finds no space."""
    path.with_name(path.name + ".unfinished").symlink_to("/dev/full")


def test_full_disk_leaves_the_checkpoint_of_before(tmp_path):
    save_checkpoint(tmp_path, {"step": 1, "weights": torch.ones(100000)})
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for size in (1, 100000):  # fails where the file is closed; within torch.save
        _fill_disk(tmp_path / "checkpoint.pt")
        with pytest.raises(TrainError, match=r"cannot write the checkpoint .*checkpoint\.pt: No space left on device"):
            save_checkpoint(tmp_path, {"step": 2, "weights": torch.zeros(size)})
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
        assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert load_checkpoint(tmp_path)["step"] == 1


def test_state_that_cannot_be_saved_is_no_full_disk(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path, {"step": lambda: 1})
    assert not list(tmp_path.iterdir())


def test_full_disk_ends_the_command_with_one_line(run_command, tmp_path, text_folder):
    def limit():  # in place of a disk: no file may be larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))

    process = run_command("train", "--data", text_folder, "--out", tmp_path, "--steps=1", *TINY, preexec_fn=limit)
    assert process.returncode == 2, process.stderr
    path = tmp_path / "checkpoint.pt"
    assert process.stderr == f"torch-sluice: error: cannot write the checkpoint {path}: File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["steps.jsonl"]


@pytest.mark.parametrize("name", ["results.json", "report.html", "figures.json"])
def test_full_disk_at_the_end(refused, tmp_path, text_folder, monkeypatch, name):
    monkeypatch.setattr("torch_sluice.train.compare.measure_side", lambda *arguments: {"problem": "not now"})
    _fill_disk(tmp_path / name)
    options = ("--data", text_folder, "--out", tmp_path, "--steps=1", "--json", tmp_path / "figures.json")
    assert f"cannot write {tmp_path / name}: No space left on device" in refused("train", *options, *TINY)
    assert not list(tmp_path.glob("*.unfinished"))
    assert load_checkpoint(tmp_path)["step"] == 1


def test_second_run_in_a_folder_is_refused(refused, tmp_path, text_folder):
    first = start_run(SMALL, str(text_folder), tmp_path, overwrite=False)
    first.save()
    for arguments in ((), ("--overwrite",), ("--mesh=dp=2", "--overwrite")):
        message = refused("train", "--data", text_folder, "--out", tmp_path, *TINY, *arguments)
        assert f"--out is '{tmp_path}', where another run is at work: wait for its end, or choose another" in message
    for arguments in ((), ("--json=figures.json",)):
        message = refused("train", "--resume", tmp_path, *arguments)
        assert f"--resume is '{tmp_path}', where another run is at work" in message
    first.close()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    start_run(SMALL, str(text_folder), tmp_path, overwrite=True).close()


def test_run_that_could_not_start_leaves_the_folder_free(refused, tmp_path, text_folder):
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    refused("train", "--data", text_folder, "--out", tmp_path, *TINY)
    refused("train", "--resume", tmp_path)
    start_run(SMALL, str(text_folder), tmp_path, overwrite=True).close()


def test_option_that_is_no_number(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_of:
        main(["train", "--steps", "many"])
    assert exit_of.value.code == 2
    error = capsys.readouterr().err
    assert "argument --steps: invalid int value: 'many'" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("options", [["--preset", "none"], ["--stepz", "3"], ["--steps"], ["text"]])
def test_options_that_there_are_not(options, capsys):
    with pytest.raises(SystemExit) as exit_of:
        main(["train", *options])
    assert exit_of.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_resume_without_checkpoint(refused, tmp_path):
    message = refused("train", "--resume", tmp_path)
    assert "holds no checkpoint.pt; give the --out folder of an earlier run" in message


def _damaged_checkpoints():
    whole = json.dumps({"not": "a checkpoint"}).encode()
    return {"empty": b"", "text": whole, "zeros": bytes(4096)}


@pytest.mark.parametrize("kind", ["empty", "text", "zeros", "cut short", "a weight changed"])
def test_damaged_checkpoint_is_neither_resumed_nor_replaced(refused, tmp_path, text_folder, kind):
    path = tmp_path / "checkpoint.pt"
    if kind in ("cut short", "a weight changed"):
        save_checkpoint(tmp_path, {"step": 1, "weights": torch.full((10000,), 3.0)})
        whole = path.read_bytes()
        middle = whole.index(torch.full((8,), 3.0).numpy().tobytes()) + 20000
        path.write_bytes(whole[:middle] + (b"\x7f" + whole[middle + 1 :] if kind == "a weight changed" else b""))
    else:
        path.write_bytes(_damaged_checkpoints()[kind])
    content = path.read_bytes()
    assert f"{path} is damaged or is not a checkpoint" in refused("train", "--resume", tmp_path)
    message = refused("train", "--data", text_folder, "--out", tmp_path, *TINY)
    assert f"{path} is damaged or is not a checkpoint" in message
    assert "--overwrite" in message
    assert path.read_bytes() == content


def test_no_changed_byte_of_a_checkpoint_passes_unseen(tmp_path):
    state = {"step": 1, "weights": torch.arange(64.0), "name": "text"}
    path = save_checkpoint(tmp_path, state)
    whole, refused = path.read_bytes(), 0
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            loaded = load_checkpoint(tmp_path)
        except TrainError:
            refused += 1
        else:  # padding, or a date
            assert torch.equal(loaded.pop("weights"), state["weights"])
            assert loaded.items() >= {"step": 1, "name": "text"}.items()
    assert refused > 64 * 4 / 3


def test_somebody_elses_checkpoint_is_neither_resumed_nor_replaced(refused, tmp_path, text_folder):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": {"weight": torch.zeros(2)}}, path)
    content = path.read_bytes()
    assert "is not a checkpoint of 'torch-sluice train'" in refused("train", "--resume", tmp_path)
    message = refused("train", "--data", text_folder, "--out", tmp_path, *TINY)
    assert "is not a checkpoint of 'torch-sluice train'" in message
    assert "--overwrite" in message
    assert path.read_bytes() == content


def test_folder_in_the_place_of_the_checkpoint(refused, tmp_path, text_folder):
    (tmp_path / "checkpoint.pt").mkdir()
    for arguments in (("--resume", tmp_path), ("--data", text_folder, "--out", tmp_path, *TINY)):
        assert f"cannot read {tmp_path / 'checkpoint.pt'}: Is a directory" in refused("train", *arguments)


def test_overwrite_replaces_a_damaged_checkpoint(tmp_path, text_folder):
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    start_run(SMALL, str(text_folder), tmp_path, overwrite=True).close()


def test_resume_from_a_checkpoint_that_would_run_code(refused, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save(Payload(), tmp_path / "checkpoint.pt")
    assert "damaged or is not a checkpoint" in refused("train", "--resume", tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory, text_folder):
    """The state of a run that has been started and saved."""
    folder = tmp_path_factory.mktemp("whole")
    run = start_run(SMALL, str(text_folder), folder, overwrite=False)
    run.save()
    run.close()
    return load_checkpoint(folder)


_KEYS = [
    *[(key,) for key in ("format", "settings", "data", "fingerprint", "step", "sides")],
    *[("settings", key) for key in ("steps", "target_density", "with_window")],
    *[("sides", side) for side in ("dense", "sluice")],
    *[("sides", "dense", key) for key in ("model", "optimizer", "random_state", "history")],
    *[("sides", "sluice", key) for key in ("controller", "accumulators")],
    *[("sides", "dense", "history", key) for key in ("loss", "seconds", "heldout_loss")],
    ("sides", "dense", "model", "lm_head.weight"),
    ("sides", "dense", "optimizer", "state"),
]


def test_the_keys_are_all_that_a_checkpoint_has(whole_checkpoint):
    assert whole_checkpoint.keys() == {key for key, *rest in _KEYS if not rest}
    assert whole_checkpoint["sides"]["sluice"].keys() == {key[2] for key in _KEYS if len(key) == 3}


def _resume_with(refused, folder, state, key, change):
    """The message of resuming from a copy of the state in which ``change(dict, name)`` was done at the key."""
    state = place = copy.deepcopy(state)
    for step in key[:-1]:
        place = place[step]
    change(place, key[-1])
    torch.save(state, folder / "checkpoint.pt")
    message = refused("train", "--resume", folder)
    assert "train anew" in message
    return message


@pytest.mark.parametrize("key", _KEYS, ids=".".join)
def test_resume_from_a_checkpoint_with_a_part_missing(refused, tmp_path, whole_checkpoint, key):
    message = _resume_with(refused, tmp_path, whole_checkpoint, key, lambda place, name: place.pop(name))
    if len(key) == 1 and key != ("format",):
        assert f"the checkpoint in '{tmp_path}' lacks '{key[0]}'" in message


_NO_LISTS = [key for key in _KEYS if key[2:3] != ("history",) or len(key) == 3]


@pytest.mark.parametrize("key", _NO_LISTS, ids=".".join)
def test_resume_from_a_checkpoint_with_a_part_of_another_type(refused, tmp_path, whole_checkpoint, key):
    _resume_with(refused, tmp_path, whole_checkpoint, key, lambda place, name: place.update({name: ["a list"]}))


@pytest.mark.parametrize("step", [-1, SMALL.steps + 1])
def test_resume_from_a_step_that_there_is_not(refused, tmp_path, whole_checkpoint, step):
    save_checkpoint(tmp_path, {**whole_checkpoint, "step": step})
    assert "does not fit its own settings" in refused("train", "--resume", tmp_path)


def test_resume_refuses_other_settings(refused, tmp_path):
    message = refused("train", "--resume", tmp_path, "--steps=5", "--preset=long")
    assert "leave out --preset, --steps" in message


def test_resume_refuses_changed_text(refused, tmp_path):
    data = tmp_path / "text.txt"
    data.write_text("some text to learn " * 200)
    run = start_run(SMALL, str(data), tmp_path / "out", overwrite=False)
    run.save()
    run.close()
    data.write_text("other text to learn " * 200)
    assert "is not what this run was trained on" in refused("train", "--resume", tmp_path / "out")
