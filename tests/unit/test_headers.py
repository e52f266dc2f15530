"""safetensors headers: what is read of honest files, and what is refused of torn and hostile ones."""

import contextlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqinfer import headers
from mqinfer.errors import PlanError

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: Mapping[str, Any] | bytes, data: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_index(folder: Path, places: Any) -> None:
    (folder / headers.INDEX_FILE).write_text(json.dumps({"weight_map": places}))


def test_a_tensor_is_found_with_its_place_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}, "a": ENTRY})
    tensor = headers.read_folder(tmp_path)["a"]
    assert (tensor.dtype, tensor.shape, tensor.elements, tensor.file) == ("F32", (2, 3), 6, path.name)
    assert tensor.end == path.stat().st_size
    assert tensor.end - tensor.begin == 24


def test_a_scalar_has_one_element(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"a": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}})
    assert headers.read_file(path)["a"].elements == 1


def test_the_tensors_of_an_index_are_gathered_from_its_files(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", {"a": ENTRY, "not in the index": ENTRY})
    write(tmp_path / "two.safetensors", {"a": ENTRY, "b": ENTRY})
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert {name: tensor.file for name, tensor in headers.read_folder(tmp_path).items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"a": "one.safetensors", "b": "one.safetensors"}, "one.safetensors lacks b, which"),
        ({"a": "gone.safetensors"}, "gone.safetensors can't be read: No such file"),
        ({"a": "../one.safetensors"}, "'../one.safetensors' is not the name of a file in the same folder"),
        ({"a": ""}, "Is a directory"),
        ({"a": None}, "None is not the name of a file"),
        ({}, "has no weight_map"),
        (["a"], "has no weight_map"),
    ],
)
def test_an_index_that_promises_too_much_is_refused(tmp_path: Path, places: Any, words: str) -> None:
    write(tmp_path / "one.safetensors", {"a": ENTRY})
    write_index(tmp_path, places)
    with pytest.raises(PlanError) as caught:
        headers.read_folder(tmp_path)
    assert words in str(caught.value)


def test_a_torn_file_is_refused_with_what_is_there_of_it(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"a": ENTRY}, bytes(23))
    size = path.stat().st_size
    with pytest.raises(PlanError, match=f"m.safetensors is torn: {size} of {size + 1} bytes are there"):
        headers.read_file(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"a": ENTRY})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(PlanError):
            headers.read_file(path)


def test_a_header_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", headers.MAX_HEADER_BYTES + 1))
        file.truncate(headers.MAX_HEADER_BYTES * 2)
    with pytest.raises(PlanError, match=f"a header of {headers.MAX_HEADER_BYTES + 1} bytes"):
        headers.read_file(path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F16"},
        {"dtype": "X9"},
        {"dtype": ["F32"]},
        {"dtype": None},
        {"shape": [2, 4]},
        {"shape": [-2, -3]},
        {"shape": [6.0]},
        {"shape": "ab"},
        {"shape": None},
        {"data_offsets": [24, 0]},
        {"data_offsets": [-24, 0]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 24, 24]},
        {"data_offsets": ["0", "24"]},
        {"data_offsets": [0, float("nan")]},
    ],
)
def test_an_entry_that_does_not_add_up_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        headers.read_file(write(tmp_path / "m", {"a": {**ENTRY, **change}}))


@pytest.mark.parametrize("header", [b"{", b"[]", b"\xff", b'{"a": []}', b'{"a": null}', b"[" * 100_000])
def test_a_header_that_is_no_header_is_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(PlanError):
        headers.read_file(write(tmp_path / "m", header))


@given(body=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, body: bytes) -> None:
    path = tmp_path_factory.mktemp("hostile") / "m"
    path.write_bytes(body)
    with contextlib.suppress(PlanError):
        assert headers.read_file(path) == {}


def test_weights_that_would_have_to_be_unpickled_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(PlanError, match=r"has PyTorch \.bin weights only: convert them to safetensors"):
        headers.read_folder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has no weights"):
        headers.read_folder(tmp_path)


def sample_of(folder: Path, data: bytes, **change: Any) -> str:
    entry = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)], **change}
    write(folder / "model.safetensors", {"a": entry}, data)
    return headers.sample(folder, headers.read_folder(folder))


def test_a_sample_sees_the_beginning_the_middle_and_the_end(tmp_path: Path) -> None:
    plain = bytes(100_000)
    seen = {sample_of(tmp_path, plain)}
    for place in (0, 1023, 50_000, 98_976, 99_999):
        seen.add(sample_of(tmp_path, plain[:place] + b"\x01" + plain[place + 1 :]))
    assert len(seen) == 6


def test_a_sample_sees_every_byte_of_a_small_tensor(tmp_path: Path) -> None:
    plain = bytes(3000)
    seen = {sample_of(tmp_path, plain[:place] + b"\x01" + plain[place + 1 :]) for place in range(0, 3000, 100)}
    assert len(seen) == 30


def test_a_sample_sees_dtype_and_shape(tmp_path: Path) -> None:
    plain = bytes(24)
    changes: list[dict[str, Any]] = [{}, {"dtype": "I8"}, {"shape": [4, 6]}, {"shape": [6, 4]}]
    assert len({sample_of(tmp_path, plain, **change) for change in changes}) == 4


def test_a_sample_does_not_care_which_file_a_tensor_is_in(tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    write(one / "model.safetensors", {"a": ENTRY, "b": {**ENTRY, "data_offsets": [24, 48]}}, bytes(range(48)))
    write(many / "x.safetensors", {"b": ENTRY}, bytes(range(24, 48)))
    write(many / "y.safetensors", {"a": ENTRY}, bytes(range(24)))
    write_index(many, {"a": "y.safetensors", "b": "x.safetensors"})
    assert len({headers.sample(folder, headers.read_folder(folder)) for folder in (one, many)}) == 1
