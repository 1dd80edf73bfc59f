"""Descriptions of GPUs and their networks: TOML files, some of which come with the package in ``devices/``."""

import math
from dataclasses import replace
from pathlib import Path

from torch_sluice.plan.shapes import Cluster
from torch_sluice.plan.units import parse_quantity

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11
    import tomli as tomllib

_FOLDER = Path(__file__).parent / "devices"
# Key of the file: (section, kind of quantity, or None for a plain number).
_KEYS = {
    "peak_flops": ("compute", "flops"),
    "peak_flops_fp8": ("compute", "flops"),
    "attention_efficiency_forward": ("compute", None),
    "attention_efficiency_backward": ("compute", None),
    "memory_bytes": ("memory", "bytes"),
    "memory_bandwidth": ("memory", "rate"),
    "gpus_per_node": ("network", None),
    "intra_bandwidth": ("network", "rate"),
    "intra_latency": ("network", "seconds"),
    "inter_bandwidth": ("network", "rate"),
    "inter_latency": ("network", "seconds"),
    "overlap_share": ("network", None),
    "gemm_efficiency": ("fitted", None),
    "gemm_half_size": ("fitted", None),
    "memory_efficiency": ("fitted", None),
    "kernel_overhead": ("fitted", "seconds"),
    "link_efficiency": ("fitted", None),
    "spread": ("fitted", None),
}


def device_names() -> list[str]:
    """Names of the descriptions that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_cluster(source: str | Path | Cluster, **changes) -> Cluster:
    """A cluster by the name of a known device (``"h100-80g"``), from a TOML file, or as it is.

    ``changes`` replace members, in base units. Raises ValueError, naming file, key and what was expected, for a
    description that lacks a key or a unit or has a key that is unknown; FileNotFoundError for a file that isn't there.
    """
    if isinstance(source, Cluster):
        return replace(source, **changes)
    path = _FOLDER / f"{str(source).lower()}.toml"
    if not path.is_file():
        path = Path(source)
        if not path.is_file():
            names = ", ".join(device_names())
            raise FileNotFoundError(f"cluster is {str(source)!r}, expected one of {names}, or a TOML file")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    return replace(_read(document, str(path)), **changes)


def _read(document, origin):
    values, sections = {}, {section for section, _ in _KEYS.values()}
    for section in sections:
        if not isinstance(document.get(section, {}), dict):
            raise ValueError(f"{origin}: {section} is {document[section]!r}, expected a table")
    for key, (section, kind) in _KEYS.items():
        if key not in document.get(section, {}):
            raise ValueError(f"{origin} lacks {key} in [{section}]")
        name, value = f"{origin}: {key}", document[section][key]
        values[key] = _number(name, value) if kind is None else parse_quantity(name, value, kind)
    unknown = [f"[{name}]" for name in document if name not in sections | {"name"}]
    unknown += [key for section in sections for key in document[section] if _KEYS.get(key, ("",))[0] != section]
    if unknown:
        raise ValueError(f"{origin} has {', '.join(unknown)}, expected no others than {', '.join(_KEYS)}")
    if values["gpus_per_node"] != int(values["gpus_per_node"]):
        raise ValueError(f"{origin}: gpus_per_node is {values['gpus_per_node']}, expected a whole number")
    values["gpus_per_node"] = int(values["gpus_per_node"])
    return Cluster(**values)


def _number(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    return value
