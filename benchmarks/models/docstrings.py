"""Summaries and descriptions of the standard library's docstrings: text that any Python has, in matching pairs."""

import ast
import sysconfig
from pathlib import Path

from benchmarks.models.task import split_by_name

# Not what a reader would call the library's documentation: tables, tests, other people's packages.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "lib2to3",
}
SHARES = {"train": 0.5, "selection": 0.2, "heldout": 0.3}  # of the files

Pair = tuple[str, str]  # a docstring's first paragraph, and the rest of it


def docstring_pairs(source: str) -> list[Pair]:
    """The pairs of a module, its classes and its functions whose docstring goes on after its first paragraph."""
    pairs, waiting = [], [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        waiting += (
            child for child in node.body if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        )
        summary, _, description = (ast.get_docstring(node) or "").partition("\n\n")
        pair = " ".join(summary.split()), " ".join(description.split())
        if len(pair[0].split()) >= 4 and len(pair[1].split()) >= 8:
            pairs.append(pair)
    return pairs


def load_pairs(most_files: int | None = None, root: Path | None = None) -> dict[str, list[Pair]]:
    """Part -> pairs; files are dealt out to the parts, and a pair that stands in several files counts once.

    Args:
        most_files: reads only so many files, the first by name.
        root: a folder of Python files; None: the standard library.

    Raises:
        RuntimeError: there are no sources with docstrings.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    }
    names = list(files)[:most_files]
    seen, parts = set(), {}
    for part, chosen in split_by_name(names, SHARES).items():
        parts[part] = []
        for name in chosen:
            try:
                pairs = docstring_pairs(files[name].read_text(encoding="utf-8"))
            except (OSError, ValueError, SyntaxError):
                continue  # not readable text of this Python
            for pair in pairs:
                if seen.isdisjoint(pair):
                    parts[part].append(pair)
                seen.update(pair)
    if not all(parts.values()):
        raise RuntimeError(
            f"{root} holds too few Python files with docstrings; expected the standard library's sources"
        )
    return parts
