"""The rooms of a family in c_core/: control flow on top, code for one processor in tiers/, CUDA in cuda/."""

import re
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "c_core"
FAMILIES = sorted(path.parent.name for path in CORE.glob("*/sources.cmake"))
INTRINSICS = re.compile(r"\b_mm\d*_\w+|<immintrin\.h>|tiers/simd\w*\.h")


def misplaced(path, text):
    """Why a file, by its path below c_core/, is not in the room that it belongs to; None where it is."""
    _, *room, _ = path.parts
    if path.suffix in {".cu", ".cuh"} and room != ["cuda"]:
        return "CUDA outside cuda/"
    if INTRINSICS.search(text) and room != ["tiers"]:
        return "vector code outside tiers/"
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_the_same_rooms(family):
    assert {path.name for path in (CORE / family).iterdir() if path.is_dir()} <= {"tiers", "cuda"}
    files = [path for path in (CORE / family).rglob("*") if path.is_file()]
    found = {str(path.relative_to(CORE)): misplaced(path.relative_to(CORE), path.read_text()) for path in files}
    assert {name: why for name, why in found.items() if why} == {}


def test_only_tiers_are_compiled_for_one_processor():
    texts = [path.read_text() for path in CORE.glob("*/sources.cmake")]
    overlays = {name for text in texts for name in re.findall(r"overlay\((\S+)", text)}
    assert overlays
    assert [name for name in overlays if name.split("/")[1] != "tiers"] == []


def test_the_check_sees_what_lies_in_another_room():
    assert misplaced(Path("attention/forward.cuh"), "") == "CUDA outside cuda/"
    assert misplaced(Path("attention/rows.c"), "x = _mm256_setzero_ps();") == "vector code outside tiers/"
    assert misplaced(Path("attention/cuda/pair.cuh"), "") is None
    assert misplaced(Path("attention/tiers/avx2.c"), '#include "runtime/tiers/simd.h"') is None
