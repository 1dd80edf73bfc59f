"""The file of a compressed model: safetensors, with a structure in JSON and a digest of all of it.

FILE  a safetensors file. Its metadata are "format": "torch-sluice compressed"; "version": "2"; "structure": JSON of
{"changes": see changes.py, "report": figures, "aliases": {name: name of the tensor that it shares}, "extra": plain
values of the state_dict}; and "sha256": the digest, in hexadecimal, of the whole file with zeros in the digest's place.
A quantised weight is two tensors, NAME.packed and NAME.scale. Nothing of a file is code, and a file is read only as far
as it was checked: its length against its header, then its digest, then its structure.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

_FORMAT, _VERSION = "torch-sluice compressed", "2"
_MARK = b'"sha256":"'
_DIGITS = 64
_LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
_CHUNK = 1 << 20


def _package():
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "files of compressed models are in the format of safetensors, which is not installed: pip install "
            "'torch-sluice[compress]'"
        ) from None
    return safetensors


def encode(tensors: dict[str, Tensor], structure: dict[str, Any]) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: a tensor is of a dtype or layout that the format does not have.
    """
    safetensors = _package()
    metadata = {
        "format": _FORMAT, "version": _VERSION, "sha256": "0" * _DIGITS,
        "structure": json.dumps(structure, default=_plain),
    }  # fmt: skip
    dense = {name: _own_memory(tensor) for name, tensor in tensors.items()}
    try:
        content = bytearray(safetensors.torch.save(dense, metadata))
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"model has a tensor that safetensors does not take: {error}") from error
    place = _place_of_digest(content, 8 + int.from_bytes(content[:8], "little"))
    digest = hashlib.sha256(content).hexdigest().encode()
    content[place : place + _DIGITS] = digest
    return bytes(content)


def _plain(value: Any) -> Any:
    """Numbers of other packages."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is no plain value")


def _own_memory(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _place_of_digest(header: bytes | bytearray, end: int) -> int:
    """Where the digest's digits begin; -1 if there is none, or more than one."""
    found = header.find(_MARK, 0, end)
    if found < 0 or header.find(_MARK, found + 1, end) >= 0 or found + len(_MARK) + _DIGITS > end:
        return -1
    return found + len(_MARK)


class Container:
    """A file that is what ``encode`` made, down to the last bit.

    Raises:
        ValueError: it is not; the message says why.
    """

    def __init__(self, path: Path):
        self._path, self._safetensors = path, _package()
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            if start[:4] == b"PK\x03\x04":
                raise ValueError(
                    f"{path} is an archive of torch.save, as files of version 1 were; expected version {_VERSION}: "
                    "compress the model again and save it, or load it with the torch-sluice that wrote it"
                )
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise self._unreadable("its header is not within its length")
            raw = file.read(length)
            header = self._parse(raw)
            metadata = header.get("__metadata__")
            if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} is no file of torch_sluice.compress.save(): load it the way it was saved")
            if metadata.get("version") != _VERSION:
                raise ValueError(
                    f"{path} has version {metadata.get('version')}, expected {_VERSION}: update torch-sluice, or save "
                    "the model again"
                )
            self._check_digest(file, start + raw, metadata.get("sha256"))
        try:
            with self._safetensors.safe_open(path, framework="pt") as tensors:  # which compares all offsets
                self._names = list(tensors.keys())
                self.shapes = {name: list(tensors.get_slice(name).get_shape()) for name in self._names}
            self.structure = json.loads(metadata["structure"])
            parts = [self.structure[part] for part in ("changes", "report", "aliases", "extra")]
        except (self._safetensors.SafetensorError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise self._unreadable(str(error).splitlines()[0][:120] if str(error) else type(error).__name__) from error
        if not all(isinstance(part, dict) for part in parts):
            raise self._unreadable("its structure is none")

    def _unreadable(self, reason: str) -> ValueError:
        return ValueError(
            f"{self._path} cannot be read ({reason}): it is damaged or cut off, or no file of "
            "torch_sluice.compress.save(). Save the model again"
        )

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            header = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise self._unreadable(f"its header is no JSON: {str(error)[:80]}") from None
        if not isinstance(header, dict):
            raise self._unreadable("its header is no JSON object")
        return header

    def _check_digest(self, file, begin: bytes, said: Any) -> None:
        place = _place_of_digest(begin, len(begin))
        if place < 0 or not isinstance(said, str) or begin[place : place + _DIGITS] != said.encode():
            raise self._unreadable("it has no digest")
        digest = hashlib.sha256(begin[:place] + b"0" * _DIGITS + begin[place + _DIGITS :])
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        if digest.hexdigest() != said:
            raise self._unreadable("its content does not match its digest")

    def read_tensors(self) -> dict[str, Tensor]:
        with self._safetensors.safe_open(self._path, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in self._names}
