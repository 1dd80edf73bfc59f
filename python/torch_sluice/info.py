"""What the plugin sees of this machine: the facts behind ``torch-sluice info``."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import torch

import torch_sluice

# Kernels that benchmarks/results has the speed of, on their silicon (tests/structure/test_measured.py compares them).
MEASURED = {
    "gated_attention": {
        "avx2_f32_6x16", "avx2_bf16_6x16",
        "avx512_f32_12x32", "avx512_f16_12x32", "avx512bf16_bf16_12x32",
    },
    "accumulate": {"avx2"},
    "channel_norms": {"avx2"},
    "quantize": {"avx2", "avx512vnni"},
}  # fmt: skip
_UNMEASURED = ", whose speed has not been measured on its silicon"
_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}  # sl_dtype

# Package -> (what needs it, how to get it).
_OPTIONAL = {
    "transformers": ("torch-sluice train, and swapping Hugging Face models", "pip install 'torch-sluice[train]'"),
    "rich": ("torch-sluice train", "pip install 'torch-sluice[train]'"),
    "matplotlib": (
        "the HTML reports of torch-sluice train and of Monitor(report=...)",
        "pip install 'torch-sluice[train]'",
    ),
    "jinja2": (
        "the HTML reports of torch-sluice train and of Monitor(report=...)",
        "pip install 'torch-sluice[train]'",
    ),
    "accelerate": ("the Trainer of transformers, and GateCallback in it", "pip install accelerate"),
    "safetensors": ("files of torch_sluice.compress.save", "pip install 'torch-sluice[compress]'"),
    "sklearn": ("the digits of benchmarks.compress_models", "pip install 'torch-sluice[models]'"),
    "onnxruntime": ("a peer of benchmarks.compress_models", "pip install 'torch-sluice[models]'"),
    "tensorboard": ("torch_sluice.Monitor(log_dir=...)", "pip install tensorboard"),
    "prometheus-client": ("torch_sluice.Monitor(metrics_port=...)", "pip install 'torch-sluice[monitor]'"),
    "lightning": ("the Trainer of Lightning, and MonitorCallback in it", "pip install lightning"),
}


def describe_plugin() -> dict:
    """Everything that ``torch-sluice info --json`` prints, as plain values."""
    library = _open_core()
    detected, used = library.sl_cpu_detect(), library.sl_cpu_isa()
    cap_problem = library.sl_cpu_cap_problem()
    facts = {
        "version": torch_sluice.__version__,
        "library": {
            "path": torch_sluice.library_path(),
            "version": library.sl_version().decode(),
            "abi": "LibTorch stable ABI, target 2.11",
            "operators": _operators(),
        },
        "python": platform.python_version(),
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "cuda_build": torch.version.cuda,
            "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            if torch.cuda.is_available()
            else [],
        },
        "cpu": {
            "model": processor_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "isa_detected": library.sl_isa_name(detected).decode(),
            "isa": library.sl_isa_name(used).decode(),
            "isa_cap": os.environ.get("SLUICE_ISA"),
            "isa_cap_problem": cap_problem.decode() if cap_problem else None,
        },
        "kernels": {
            "gated_attention": {
                name: library.sl_gated_attention_kernel_name(number).decode() for name, number in _DTYPES.items()
            },
            "accumulate": {"every dtype": library.sl_accumulate_kernel_name().decode()},
            "channel_norms": {"every dtype": library.sl_channel_norms_kernel_name().decode()},
            "quantize": {"every dtype": library.sl_quantize_kernel_name().decode()},
        },
        "packages": {name: _version_of(name) for name in _OPTIONAL},
    }
    facts["measured"] = {
        family: {dtype: is_measured(family, kernel) for dtype, kernel in kernels.items()}
        for family, kernels in facts["kernels"].items()
    }
    facts["missing"] = _find_missing(facts)
    return facts


def is_measured(family: str, kernel: str) -> bool:
    """Whether the speed of a kernel was measured on a processor that has its instructions.

    Others are right, as far as tests in emulation show. Plain C claims no speed.
    """
    return kernel in MEASURED[family] or kernel.startswith(("scalar", "reference"))


def _open_core() -> ctypes.CDLL:
    """The C functions that the operator library exports beside its operators (ops/sluice/cpu.h and others)."""
    library = ctypes.CDLL(torch_sluice.library_path())
    for name in (
        "sl_version",
        "sl_isa_name",
        "sl_cpu_cap_problem",
        "sl_gated_attention_kernel_name",
        "sl_accumulate_kernel_name",
        "sl_channel_norms_kernel_name",
        "sl_quantize_kernel_name",
    ):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def _operators() -> dict[str, list[str]]:
    """Operator -> devices that it has a kernel for."""
    names = sorted({schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("sluice::")})
    return {
        name: [key for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)]
        for name in names
    }


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed" if importlib.util.find_spec(package) else None


def _find_missing(facts: dict) -> list[dict[str, str]]:
    missing = [
        {"what": name, "needed_for": purpose, "how": command}
        for name, (purpose, command) in _OPTIONAL.items()
        if facts["packages"][name] is None
    ]
    cuda_kernels = any("CUDA" in devices for devices in facts["library"]["operators"].values())
    if not cuda_kernels:
        missing.append(
            {
                "what": "CUDA kernels",
                "needed_for": "models on an NVIDIA GPU",
                "how": "build with nvcc: pip install . -C cmake.define.SLUICE_BUILD_CUDA=ON",
            }
        )
    elif not facts["torch"]["cuda_build"]:
        missing.append(
            {
                "what": "a CUDA build of torch",
                "needed_for": "the CUDA kernels, which this library has",
                "how": "install torch's CUDA wheel",
            }
        )
    elif not facts["torch"]["cuda_devices"]:
        missing.append(
            {
                "what": "a CUDA device",
                "needed_for": "the CUDA kernels",
                "how": "none is visible: check the driver and CUDA_VISIBLE_DEVICES",
            }
        )
    if facts["kernels"]["gated_attention"]["float32"].startswith("reference"):
        missing.append(
            {
                "what": "a fast kernel for this processor",
                "needed_for": "speed: the reference serves it",
                "how": "see docs/add_a_kernel.md",
            }
        )
    return missing


def fact_lines(facts: dict) -> list[str]:
    """The facts for people."""
    cpu, torch_facts = facts["cpu"], facts["torch"]
    cap = f", capped from {cpu['isa_detected']} by SLUICE_ISA" if cpu["isa"] != cpu["isa_detected"] else ""
    build = f"for CUDA {torch_facts['cuda_build']}" if torch_facts["cuda_build"] else "without CUDA"
    rows = [
        ("torch-sluice", facts["version"]),
        ("library", facts["library"]["path"]),
        ("ABI", facts["library"]["abi"]),
        ("torch", f"{torch_facts['version']} (built {build}), Python {facts['python']}"),
        ("processor", f"{cpu['model']}, {cpu['cores']} cores; torch uses {torch_facts['threads']} threads"),
        ("kernel tier", cpu["isa"] + cap),
        ("CUDA devices", ", ".join(torch_facts["cuda_devices"]) or "none visible"),
    ]
    if cpu["isa_cap_problem"]:
        rows.append(("", cpu["isa_cap_problem"]))
    for family, kernels in facts["kernels"].items():
        measured = facts["measured"][family]
        rows += [
            (f"{family}, {dtype}", kernel + ("" if measured[dtype] else _UNMEASURED))
            for dtype, kernel in kernels.items()
        ]
    rows += [(name, " and ".join(devices)) for name, devices in facts["library"]["operators"].items()]
    rows += [(name, version or "not installed") for name, version in facts["packages"].items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if facts["missing"]:
        lines += ["", "Missing:"]
        lines += [f"  {gap['what']} (for {gap['needed_for']}): {gap['how']}" for gap in facts["missing"]]
    return lines
