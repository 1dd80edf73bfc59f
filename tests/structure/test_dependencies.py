"""Dependencies run one way: python -> torch_bindings -> c_core -> ops."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NATIVE = {".c", ".h", ".cpp", ".cu", ".cuh", ".def"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)

PLAIN_HEADERS = {"stdbool.h", "stddef.h", "stdint.h"}
C_HEADERS = PLAIN_HEADERS | {
    *("errno.h", "fenv.h", "float.h", "inttypes.h", "limits.h", "math.h", "stdalign.h", "stdarg.h"),
    *("stdatomic.h", "stdio.h", "stdlib.h", "sched.h", "string.h", "time.h", "threads.h"),
}
# What shared memory between processes stands on: comm only.
SYSTEM_HEADERS = re.compile(r"(unistd|fcntl|pthread|linux/futex|sys/(mman|prctl|random|stat|syscall|uio))\.h")
INTRINSICS = re.compile(r"(immintrin|arm_neon)\.h|simde/.*")
# What a shim may take of torch: the stable ABI, plain C, and what both are made of.
TORCH_HEADERS = re.compile(r"torch/(csrc/stable|headeronly)/[\w/]+\.h|torch/csrc/inductor/aoti_torch/c/shim\.h")
CXX_HEADERS = {
    *("algorithm", "array", "cstddef", "cstdint", "functional", "initializer_list", "limits", "memory", "mutex", "new"),
    *("optional", "stdexcept", "string", "string_view", "tuple", "type_traits", "utility", "vector"),
}
CUDA_HEADERS = re.compile(r"(cuda_\w+|cuda|mma|cooperative_groups)\.h|c(math|stdint|stddef|float)")


def native_files(room):
    return sorted(path for path in (REPOSITORY / room).rglob("*") if path.suffix in NATIVE)


def forbidden_includes(room, path, text):
    """Includes that a file in this room may not have."""
    found = []
    for quote, name in INCLUDE.findall(text):
        if name.startswith("sluice/"):
            allowed = quote == "<"
        elif room == "ops":
            allowed = name in PLAIN_HEADERS
        elif room == "c_core" and quote == "<":
            is_cuda = path.suffix in {".cu", ".cuh"} and CUDA_HEADERS.fullmatch(name)
            is_system = "comm" in path.parts and SYSTEM_HEADERS.fullmatch(name)
            allowed = name in C_HEADERS or INTRINSICS.fullmatch(name) or is_cuda or is_system
        elif room == "c_core":
            allowed = (REPOSITORY / "c_core" / name).is_file()
        elif quote == "<" and "c10d" in path.parts:
            # Torch has no stable interface for process groups; this room alone is built against one release of it.
            allowed = "/" not in name or name.startswith(("torch/", "ATen/", "c10/"))
        elif quote == "<":
            allowed = name in CXX_HEADERS or TORCH_HEADERS.fullmatch(name)
        else:
            allowed = (REPOSITORY / "torch_bindings" / name).is_file()
        if not allowed:
            found.append(name)
    return found


@pytest.mark.parametrize("room", ["ops", "c_core", "torch_bindings"])
def test_native_code_includes_only_what_is_below_it(room):
    files = native_files(room)
    assert files
    found = {path.name: forbidden_includes(room, path, path.read_text()) for path in files}
    assert {name: includes for name, includes in found.items() if includes} == {}


def test_the_check_sees_an_include_that_runs_upwards():
    upwards = '#include <torch/csrc/stable/tensor.h>\n#include "torch_bindings/shim.h"\n#include <stdint.h>\n'
    found = forbidden_includes("c_core", Path("x.c"), upwards)
    assert found == ["torch/csrc/stable/tensor.h", "torch_bindings/shim.h"]
    assert forbidden_includes("ops", Path("x.h"), "#include <math.h>") == ["math.h"]
    shim = (
        "#include <torch/csrc/stable/tensor.h>\n#include <vector>\n#include <attention/kernel.h>\n"
        '#include "attention/kernel.h"\n#include <torch/torch.h>\n#include <ATen/ATen.h>\n#include <iostream>\n'
    )
    assert forbidden_includes("torch_bindings", Path("x.cpp"), shim) == [
        *("attention/kernel.h", "attention/kernel.h", "torch/torch.h", "ATen/ATen.h", "iostream"),
    ]


def strip_comments(text):
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


# A shim that computes needs a typed pointer into a tensor, or a numeric header. Pointers to int64 stay allowed:
# strides, sizes and ranges are handed to C through them.
ARITHMETIC = [
    re.compile(r"<\s*(?:const\s+)?(?:float|double|_Float16|__bf16|u?int(?:8|16|32)_t)\s*\*"),
    re.compile(r"\(\s*(?:const\s+)?(?:float|double)\s*\*\s*\)"),
    re.compile(r"data_ptr\s*<"),
    re.compile(r"#\s*include\s*<(?:cmath|numeric|immintrin\.h|math\.h|valarray)>"),
    re.compile(r"\bstd::(?:accumulate|transform|inner_product|reduce)\b"),
]


def find_arithmetic(text):
    return [match.group(0) for pattern in ARITHMETIC for match in pattern.finditer(strip_comments(text))]


def test_shims_do_no_arithmetic_on_tensor_data():
    files = [path for path in native_files("torch_bindings") if "c10d" not in path.parts]
    found = {path.name: find_arithmetic(path.read_text()) for path in files}
    assert {name: places for name, places in found.items() if places} == {}


def test_the_check_sees_a_shim_that_computes():
    loop = "auto *x = static_cast<const float *>(t.const_data_ptr()); for (int i = 0; i < n; ++i) sum += x[i];"
    assert find_arithmetic(loop)
    assert find_arithmetic("float *x = (float *)p;")
    assert not find_arithmetic("// static_cast<float *>(p)")


SPEAKS = re.compile(
    r"(?<![\w.])("
    r"abort|exit|_Exit|quick_exit|raise|assert|__assert_fail|__builtin_trap|__builtin_abort|__trap|std::terminate|"
    r"printf|vprintf|puts|putchar|fprintf|vfprintf|dprintf|perror|fputs|fputc|putc|fwrite"
    r")\s*\(|\b(std::(?:cerr|cout|clog|abort|exit|terminate)|stderr|stdout)\b"
)


def find_speech(text, own_methods=()):
    """``own_methods``: names that a class of the file has to have, being another's interface."""
    for name in own_methods:
        text = re.sub(rf"\b{name}\(", "(", text)
    return [match[1] or match[2] for match in SPEAKS.finditer(strip_comments(text))]


@pytest.mark.parametrize("room", ["c_core", "torch_bindings"])
def test_native_code_neither_prints_nor_ends_the_process(room):
    # c10d::Backend has a method abort().
    found = {
        path.name: find_speech(path.read_text(), ["abort"] if "c10d" in path.parts else [])
        for path in native_files(room)
    }
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_the_check_sees_what_prints_or_ends_the_process():
    text = 'printf("x"); snprintf(b, 1, "x"); abort (); static_assert(1); _Static_assert(1, ""); // exit(1)'
    assert find_speech(text) == ["printf", "abort"]
    text = "std::cerr << 1; std::terminate(); __builtin_trap(); assert(x); fprintf(stderr, b); my.exit(); sl_exit();"
    assert find_speech(text) == ["std::cerr", "std::terminate", "__builtin_trap", "assert", "fprintf", "stderr"]


def test_the_package_imports_neither_tests_nor_benchmarks():
    imports = re.compile(r"^\s*(?:from|import)\s+(tests|benchmarks)\b", re.M)
    assert [path.name for path in (REPOSITORY / "python").rglob("*.py") if imports.search(path.read_text())] == []
