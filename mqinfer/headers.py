"""The headers of safetensors files: which tensors a checkpoint has, of what dtype and shape, and where their bytes are.

Files come from strangers: every length is checked before it is believed. Standard library only; no tensor is ever
built here, and what a tensor is for is `checkpoint.py`.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mqinfer.errors import PlanError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: The safetensors library's own limit.
MAX_HEADER_BYTES = 100 * 2**20
#: Of each tensor so many bytes are read at its beginning, middle and end for a fingerprint.
SAMPLE_BYTES = 1024

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    "F4": 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """What a file says of one tensor."""

    #: By safetensors' name, such as "BF16".
    dtype: str
    shape: tuple[int, ...]
    #: The file's name inside the checkpoint's folder.
    file: str
    #: Its bytes are [begin, end) of the file.
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def read_folder(folder: Path) -> dict[str, TensorHeader]:
    """The tensors of a checkpoint, one file or many. Raises: PlanError where one is missing, torn or something else."""
    if (folder / INDEX_FILE).is_file():
        return _read_sharded(folder)
    if (folder / SINGLE_FILE).is_file():
        return read_file(folder / SINGLE_FILE)
    if any(folder.glob("*.bin")):
        raise PlanError(
            f"{folder} has PyTorch .bin weights only: convert them to safetensors (they are never unpickled)"
        )
    raise PlanError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def read_file(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one file. Raises: PlanError where it is missing, torn or not safetensors."""
    with _opened(path) as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise PlanError(f"{path} is no safetensors file or is torn: a header of {length} bytes in {size} bytes")
        tensors = _parse(path, file.read(length), 8 + length)
    needed = max((tensor.end for tensor in tensors.values()), default=0)
    if needed > size:
        raise PlanError(f"{path} is torn: {size} of {needed} bytes are there")
    return tensors


def sample(folder: Path, tensors: Mapping[str, TensorHeader]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and samples of its bytes, however they are spread over files.

    3 KiB of each tensor: seconds for a checkpoint of any size, and a fine-tune that leaves them all alone is none.

    Raises: PlanError where a file can't be read.
    """
    digests: dict[str, bytes] = {}
    for name in sorted({tensor.file for tensor in tensors.values()}):
        with _opened(folder / name) as file:
            mine = {key: tensor for key, tensor in tensors.items() if tensor.file == name}
            digests |= {key: _digest(file, key, tensor) for key, tensor in mine.items()}
    return hashlib.sha256(b"".join(digests[key] for key in sorted(digests))).hexdigest()


def _digest(file: BinaryIO, name: str, tensor: TensorHeader) -> bytes:
    digest = hashlib.sha256(json.dumps([name, tensor.dtype, tensor.shape]).encode())
    last = max(tensor.end - SAMPLE_BYTES, tensor.begin)
    for begin in (tensor.begin, (tensor.begin + last) // 2, last):
        file.seek(begin)
        digest.update(file.read(min(SAMPLE_BYTES, tensor.end - begin)))
    return digest.digest()


def _read_sharded(folder: Path) -> dict[str, TensorHeader]:
    places = _weight_map(folder / INDEX_FILE)
    files = {name: read_file(folder / name) for name in sorted(set(places.values()))}
    for key, name in places.items():
        if key not in files[name]:
            raise PlanError(f"{folder / name} lacks {key}, which {INDEX_FILE} promises")
    return {key: files[name][key] for key, name in places.items()}


def _weight_map(path: Path) -> dict[str, str]:
    with _opened(path) as file:
        places = _object(path, file.read()).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise PlanError(f"{path} has no weight_map")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise PlanError(f"{path}: {name!r} is not the name of a file in the same folder")
    return places


def _parse(path: Path, header: bytes, start: int) -> dict[str, TensorHeader]:
    entries = _object(path, header)
    entries.pop("__metadata__", None)
    return {name: _tensor(path, name, entry, start) for name, entry in entries.items()}


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorHeader:
    try:
        begin, end = entry["data_offsets"]
        tensor = TensorHeader(
            dtype=entry["dtype"], shape=tuple(entry["shape"]), file=path.name, begin=start + begin, end=start + end
        )
        bits = 8 * (end - begin)
        explained = (
            all(type(number) is int and number >= 0 for number in (*tensor.shape, begin, end))
            and tensor.elements * _BITS.get(tensor.dtype, 0) == bits
        )
    except (TypeError, KeyError, ValueError) as error:
        raise PlanError(f"{path}: the header's entry {name!r} can't be read") from error
    if not explained:
        raise PlanError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, which {bits // 8} bytes are not")
    return tensor


def _object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} can't be read: not JSON") from error
    if not isinstance(value, dict):
        raise PlanError(f"{path} can't be read: not a JSON object")
    return value


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise PlanError(f"{path} can't be read: {error.strerror}") from error
