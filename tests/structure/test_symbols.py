"""What the libraries export is what ops/ documents: no more and no less."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import torch_sluice

REPOSITORY = Path(__file__).parents[2]
HEADERS = sorted((REPOSITORY / "ops/sluice").glob("*.h"))
# Of the builds that are installed, the newest: `make test` makes one of them.
C_BUILDS = [REPOSITORY / "build" / preset / "c_core/libsluice.so" for preset in ("release", "cuda")]
C_LIBRARY = max(C_BUILDS, key=lambda path: path.stat().st_mtime if path.is_file() else 0)


def libraries():
    if not C_LIBRARY.is_file():
        reason = f"{C_LIBRARY.name} is not built: cmake --preset release && cmake --build --preset release"
        yield pytest.param(C_LIBRARY, marks=pytest.mark.skip(reason=reason), id="libsluice.so")
    else:
        yield pytest.param(C_LIBRARY, id="libsluice.so")
    yield pytest.param(Path(torch_sluice.library_path()), id="libsluice_torch.so")


def exported(library):
    lines = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {line.split()[-1] for line in lines}


def declared(text):
    """Functions that a header declares as public, and of those the ones without documentation.

    A declaration is documented by a comment right above its group of lines, by one behind it, or by the text on top of
    the header, which names it without its prefix as an operator.
    """
    top = text[: text.index("*/")]
    functions, silent = set(), set()
    for group in re.split(r"\n\s*\n", text):
        for match in re.finditer(r"SL_API\b[^;{]*?\b(sl_\w+)\s*\([^;]*;(.*)", group):
            functions.add(match[1])
            commented = "*/" in group[: match.start()] or "/*" in match[2]
            if not commented and not re.search(rf"\b{match[1].removeprefix('sl_')}_?\(", top):
                silent.add(match[1])
    return functions, silent


@pytest.mark.parametrize("library", list(libraries()))
def test_exports_are_the_declared_functions(library):
    functions = set().union(*(declared(header.read_text())[0] for header in HEADERS))
    assert functions
    assert exported(library) == functions


def test_every_public_function_is_documented():
    silent = set().union(*(declared(header.read_text())[1] for header in HEADERS))
    assert silent == set()


def test_the_check_sees_an_undocumented_function():
    header = (
        "/* Top. foo(int) */\n\nSL_API int sl_foo(int);\n\nSL_API int sl_bar(\n    int);\n\n"
        "/* Doc. */\nSL_API int sl_baz(int);\n"
    )
    assert declared(header) == ({"sl_foo", "sl_bar", "sl_baz"}, {"sl_bar"})


def test_every_operator_is_documented():
    operators = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sluice::")}
    assert operators
    text = "".join(header.read_text() for header in HEADERS)
    assert {name for name in operators if f"{name.split('.')[0]}(" not in text} == set()
