"""Published training runs as what the planner takes: two sets of columns, and assumptions where a row doesn't say."""

import csv
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch_sluice.plan import Cluster, Layout, ModelShape, predict

_FOLDER = Path(__file__).parent / "data"
GIVEN = [_FOLDER / "published_training_runs.csv", _FOLDER / "published_runs_h100_b200.csv"]
# Runs that no number was fitted to.
HELD_OUT = [_FOLDER / "published_runs_b200_405b.csv", _FOLDER / "published_runs_a100_2022.csv"]
MEMORY = _FOLDER / "published_memory_b200.csv"

_GPT_COLUMNS = {
    *("source", "params_b", "heads", "hidden", "layers", "tp", "pp", "dp", "gpus", "global_batch"),
    *("micro_batch", "interleave", "recompute", "step_s"),
}
_FULL_COLUMNS = {
    *("source", "model", "heads", "kv_heads", "hidden", "ffn", "layers", "vocab", "seq", "gpu", "gpus", "tp", "pp"),
    *("vpp", "dp", "cp", "micro_batch", "global_batch", "precision", "recompute", "step_s"),
}
_DEVICES = {"A100": "a100-80g", "H100": "h100-80g", "H200": "h200", "B200": "b200"}


@dataclass(frozen=True)
class Row:
    """A published run. ``family``: the model whatever its layers were cut to; ``assumed``: what the row doesn't say."""

    source: str
    model: str
    device: str
    shape: ModelShape
    layout: Layout
    published_s: float
    assumed: dict = field(default_factory=dict)
    open_choices: tuple[str, ...] = ()

    @property
    def family(self) -> tuple[str, str]:
        return self.device, re.sub(r" cut to \d+ layers$", "", self.model)


# What the software of a source does. Each is said by the source; docs/plan.md has the places.
_MEGATRON_2021 = dict(  # Megatron-LM of SC'21: nothing overlaps; gradients in float16, added up by a pass
    zero=0, sequence_parallel=False, fused_attention=False, fused_loss=False, fused_accumulation=False,
    tp_overlap="none", pp_overlap=False, dp_overlap=False, gradient_bytes=2.0, reduce_bytes=2.0, state_bytes=16.0,
)  # fmt: skip
_MEGATRON_2022 = _MEGATRON_2021 | dict(fused_accumulation=True, tp_overlap="gradients")
_NEMO = dict(  # NVIDIA's recipes: distributed optimizer, bfloat16 gradients, user buffers for tensor parallel
    zero=1, fused_attention=True, tp_overlap="all", pp_overlap=True, dp_overlap=True, gradient_bytes=2.0,
    reduce_bytes=2.0, exchange="ring",
)  # fmt: skip
_SIMUMAX = dict(  # Megatron-LM of 2026 with overlap off: distributed optimizer, float32 gradients, all-to-all context
    zero=1, fused_attention=True, fused_loss=True, tp_overlap="gradients", pp_overlap=False, dp_overlap=False,
    exchange="all-to-all",
)  # fmt: skip

SOFTWARE = {
    "source A (Megatron-LM, SC'21)": _MEGATRON_2021,
    "source B (Megatron-LM, 2022)": _MEGATRON_2022,
    "SimuMax's (Megatron-LM, 2026)": _SIMUMAX,
    "all others (NeMo)": _NEMO,
}


def read_memory() -> list[tuple[str, Row, float]]:
    """Name, run (its time unknown) and published peak bytes of each row of MEMORY."""
    lines = [line for line in MEMORY.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    result = []
    for values in csv.DictReader(lines):
        full = values | {"vpp": "", "precision": "BF16", "recompute": "", "step_s": "1"}
        result.append((values["model"], _full_row(_Values(full)), float(values["alloc_gib"]) * 2**30))
    return result


class RowError(ValueError):
    """A file that isn't a table of runs; the text names file, line and column."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a file with either set of columns. Raises RowError, or FileNotFoundError."""
    try:
        lines = [
            line for line in Path(path).read_text(encoding="utf-8").splitlines() if line[:1] != "#" and line.strip()
        ]
    except UnicodeDecodeError:
        raise RowError(f"{path} is not text, expected a CSV file") from None
    reader = csv.DictReader(lines)
    columns = set(reader.fieldnames or ())
    missing = {kind: needed - columns for kind, needed in (("full", _FULL_COLUMNS), ("gpt", _GPT_COLUMNS))}
    kind = min(missing, key=lambda name: len(missing[name]))
    if missing[kind]:
        raise RowError(f"{path} lacks the columns {', '.join(sorted(missing[kind]))}")
    read = _full_row if kind == "full" else _gpt_row
    rows = []
    for number, values in enumerate(reader, 1):
        try:
            rows.append(read(_Values(values)))
        except ValueError as error:
            raise RowError(f"{path}, row {number}: {error}") from None
    if not rows:
        raise RowError(f"{path} has no rows, expected at least one run")
    return rows


class _Values:
    def __init__(self, values):
        self.values = values

    def text(self, name):
        return (self.values.get(name) or "").strip()

    def whole(self, name, default=None):
        text = self.text(name)
        if not text and default is not None:
            return default
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{name} is {text!r}, expected a whole number") from None

    def seconds(self):
        text = self.text("step_s")
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ValueError(f"step_s is {text!r}, expected seconds above 0")
        return value


def _gpt_row(values):
    heads, hidden, layers = values.whole("heads"), values.whole("hidden"), values.whole("layers")
    if heads < 1 or hidden % heads:
        raise ValueError(f"hidden is {hidden}, expected a multiple of heads = {heads}")
    shape = ModelShape(layers, hidden, heads, heads, hidden // heads, 4 * hidden, 51200, 2048, gated=False, tied=True,
                       dropout=True)  # fmt: skip
    is_korthikanti = values.text("source") == "B"
    recompute = _recompute(values, "full")
    software = dict(_MEGATRON_2022 if is_korthikanti else _MEGATRON_2021)
    software["sequence_parallel"] = is_korthikanti and recompute == "selective"
    vpp, pp = values.whole("interleave", 0), values.whole("pp")
    micro = values.whole("micro_batch", 0)
    unknown = tuple(name for name, value in (("micro_batch", micro), ("vpp", vpp)) if not value)
    unknown = tuple(name for name in unknown if name != "vpp" or pp > 1)
    layout = Layout(values.whole("gpus"), values.whole("global_batch"), dp=values.whole("dp"), tp=values.whole("tp"),
                    pp=pp, vpp=vpp or 1, micro_batch=micro or 1, schedule="interleaved" if vpp > 1 else "1f1b",
                    recompute=recompute, **software)  # fmt: skip
    model = f"GPT {values.text('params_b')}B"
    assumed = {"attention": "in memory"}
    return Row(values.text("source"), model, "a100-80g", shape, layout, values.seconds(), assumed, unknown)


def _full_row(values):
    model, source = values.text("model"), values.text("source")
    names = [name for name in _DEVICES if name in values.text("gpu")]
    if len(names) != 1:
        raise ValueError(f"gpu is {values.text('gpu')!r}, expected one of {', '.join(_DEVICES)}")
    precision = values.text("precision").lower()
    is_gpt = "gpt" in model.lower()
    heads, hidden = values.whole("heads"), values.whole("hidden")
    if heads < 1 or hidden % heads:
        raise ValueError(f"hidden is {hidden}, expected a multiple of heads = {heads}")
    shape = ModelShape(values.whole("layers"), hidden, heads, values.whole("kv_heads"), hidden // heads,
                       values.whole("ffn"), values.whole("vocab"), values.whole("seq"), gated=not is_gpt, tied=is_gpt,
                       dropout=is_gpt)  # fmt: skip
    tp, vpp = values.whole("tp"), values.whole("vpp", 1)
    software = dict(_SIMUMAX if "SimuMax" in source else _NEMO | {"fused_loss": not is_gpt})
    assumed = {} if values.text("recompute") else {"recompute": "none"}
    layout = Layout(values.whole("gpus"), values.whole("global_batch"), dp=values.whole("dp"), tp=tp,
                    pp=values.whole("pp"), cp=values.whole("cp"), vpp=vpp,
                    micro_batch=values.whole("micro_batch", 1), precision=precision,
                    schedule="interleaved" if vpp > 1 else "1f1b", sequence_parallel=tp > 1,
                    recompute=_recompute(values, "none"), **software)  # fmt: skip
    return Row(source, model, _DEVICES[names[0]], shape, layout, values.seconds(), assumed)


def _recompute(values, default):
    text = values.text("recompute").lower()
    return text or default


def close_choices(row: Row, cluster: Cluster) -> Row:
    """The row with what it leaves open chosen: the fastest that fits by the planner, as who ran it will have done."""
    if not row.open_choices:
        return row
    best = None
    for micro in (1, 2, 4, 8, 16) if "micro_batch" in row.open_choices else (row.layout.micro_batch,):
        for vpp in range(1, 5) if "vpp" in row.open_choices else (row.layout.vpp,):
            layout = replace(row.layout, micro_batch=micro, vpp=vpp, schedule="interleaved" if vpp > 1 else "1f1b")
            try:
                estimate = predict(row.shape, cluster, layout)
            except ValueError:
                continue
            key = (estimate.total_bytes > cluster.memory_bytes, estimate.step_s)
            if best is None or key < best[0]:
                best = (key, layout)
    if best is None:
        predict(row.shape, cluster, row.layout)  # says what is wrong with the row, if it is that
        raise ValueError(f"no micro-batch suits global_batch {row.layout.global_batch}")
    assumed = row.assumed | {name: getattr(best[1], name) for name in row.open_choices}
    return replace(row, layout=best[1], assumed=assumed, open_choices=())
