"""Files are whole or not there, and one that cannot be read is an `InputError` that says where."""

import pickle
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from pe_rlhf.system.files import (
    locked,
    new_file,
    new_folder,
    read_json,
    read_jsonl,
    truncate_jsonl,
    write_json,
    write_jsonl,
)
from pe_rlhf.system.tensor_files import load_tensors, save_tensors
from reward.errors import InputError

NOT_OBJECTS = {
    "a list": b"[1]",
    "a number": b"3",
    "text": b'"a"',
    "null": b"null",
    "cut": b'{"a": ',
    "not UTF-8": b'{"a": "\xff"}',
    "nested": b"[" * 20_000,
    "empty": b"",
    "a long number": b"1" * 5_000,
}


@pytest.mark.parametrize("content", NOT_OBJECTS.values(), ids=NOT_OBJECTS)
def test_json_that_is_no_object_is_refused_with_its_place(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_json(path)
    assert (raised.value.kind, raised.value.file, raised.value.row) == ("unreadable", str(path), None)
    path.write_bytes(b'{"step": 1}\n' + content + b'\n{"step": 3}\n')
    for read in (read_jsonl, lambda path: read_jsonl(path, may_be_cut=True), lambda path: truncate_jsonl(path, 3)):
        with pytest.raises(InputError) as raised:
            read(path)
        assert (raised.value.kind, raised.value.file, raised.value.row) == ("unreadable", str(path), 2)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        read_json(tmp_path / "a.json")
    assert (raised.value.kind, raised.value.file) == ("missing", str(tmp_path / "a.json"))
    assert read_jsonl(tmp_path / "a.jsonl") == []
    with pytest.raises(InputError) as raised:
        read_jsonl(tmp_path)
    assert (raised.value.kind, raised.value.file) == ("unreadable", str(tmp_path))


def test_a_key_that_a_file_lacks_is_named_with_the_file_and_its_row(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    write_jsonl(tmp_path / "a.jsonl", [{"a": 1}, {"b": 2}])
    one, (_, second) = read_json(tmp_path / "a.json"), read_jsonl(tmp_path / "a.jsonl")
    assert (one["a"], one.get("b"), second["b"]) == (1, None, 2)
    with pytest.raises(InputError) as raised:
        one["b"]
    assert (raised.value.key, raised.value.file, raised.value.row) == ("b", str(tmp_path / "a.json"), None)
    with pytest.raises(InputError) as raised:
        pickle.loads(pickle.dumps(second))["a"]  # as another rank gets it
    assert (raised.value.key, raised.value.file, raised.value.row) == ("a", str(tmp_path / "a.jsonl"), 2)

    @dataclass
    class Holder:
        rows: list[dict[str, object]]

    copied = asdict(Holder([second]))  # makes each mapping anew
    assert copied == {"rows": [{"b": 2}]}
    with pytest.raises(KeyError):
        copied["rows"][0]["a"]


def test_a_last_line_that_is_cut_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(path, may_be_cut=True) == [{"step": 1}, {"step": 2}]
    with pytest.raises(InputError) as raised:
        read_jsonl(path)
    assert raised.value.row == 3


@pytest.mark.parametrize("line", ['{"loss": 1}', '{"step": "2"}', '{"step": null}'])
def test_a_line_without_a_step_is_not_cut_away(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    before = path.read_bytes()
    with pytest.raises(InputError) as raised:
        truncate_jsonl(path, 3)
    assert (raised.value.file, raised.value.row) == (str(path), 2)
    assert path.read_bytes() == before


def test_what_fails_half_way_leaves_the_old_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_text("old")
    for shared in (False, True):
        with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a", shared=shared) as scratch:
            _fail_in(scratch, KeyboardInterrupt())
    with pytest.raises(OSError, match="disk"), new_folder(tmp_path / "b") as scratch:
        _fail_in(scratch / "c", OSError("disk"))
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {"a", "b", "b/c"}
    assert [(tmp_path / name).read_text() for name in ("a", "b/c")] == ["old", "old"]
    with new_folder(tmp_path / "b") as scratch:
        (scratch / "d").write_text("new")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["d"]


def _fail_in(path: Path, error: BaseException) -> None:
    path.write_text("half")
    raise error


def test_a_folder_that_is_held_is_refused_or_waited_for(tmp_path: Path) -> None:
    # A lock belongs to the file that was opened, so a thread with a file of its own is as good as another process.
    holds, order = Event(), []

    def hold() -> None:
        with locked(tmp_path):
            holds.set()
            time.sleep(0.3)
            order.append("first")

    holder = Thread(target=hold)
    holder.start()
    holds.wait()
    with pytest.raises(InputError) as raised, locked(tmp_path):
        pass
    assert (raised.value.kind, raised.value.file) == ("in_use", str(tmp_path))
    with locked(tmp_path, wait=True):
        order.append("second")
    holder.join()
    assert order == ["first", "second"]


def test_tensors_that_are_missing_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError) as raised:
        load_tensors(path)
    assert (raised.value.kind, raised.value.file) == ("missing", str(path))
    save_tensors({"a": torch.arange(4)}, path)
    assert torch.equal(load_tensors(path)["a"], torch.arange(4))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError) as raised:
        load_tensors(path)
    assert (raised.value.kind, raised.value.file) == ("unreadable", str(path))
    with pytest.raises(OSError, match="nowhere"):
        save_tensors({"a": torch.arange(4)}, tmp_path / "nowhere" / "a.safetensors")
