"""Checkpoints: whole or not there, damage is noticed and passed over."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pe_rlhf.model.tensors import with_prefix, without_prefix
from pe_rlhf.runs.checkpoint import load_checkpoint, save_checkpoint


def tensors(step: int) -> dict[str, Tensor]:
    return {"policy/a": torch.full((20, 30), float(step)), "engine/steps": torch.tensor(step)}


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, step, tensors(step), {"beta": step / 7, "seconds": 0.1 * step})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_is(loaded: tuple[int, dict[str, Tensor], dict[str, Any]] | None, step: int) -> None:
    assert loaded is not None
    assert loaded[0] == step
    assert loaded[1].keys() == tensors(step).keys()
    assert all(torch.equal(tensor, tensors(step)[name]) for name, tensor in loaded[1].items())
    assert loaded[2] == {"step": step, "beta": step / 7, "seconds": 0.1 * step}


def test_the_newest_of_those_kept_is_loaded(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    save(tmp_path, 5)
    assert_is(load_checkpoint(tmp_path), 5)
    save(tmp_path, 10, 15, 100)
    assert names(tmp_path) == ["step-000015", "step-000100"]
    assert_is(load_checkpoint(tmp_path), 100)


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, score in enumerate([0.1, 0.9, None, 0.5, float("nan"), 0.3, 0.2], start=1):
        save_checkpoint(tmp_path, step, tensors(step), {}, keep=2, score=score)
    assert names(tmp_path) == ["step-000002", "step-000006", "step-000007"]
    save_checkpoint(tmp_path, 8, tensors(8), {}, keep=1, score=0.95)
    assert names(tmp_path) == ["step-000008"]


def test_of_equal_scores_the_first_alone_is_kept(tmp_path: Path) -> None:
    for step, score in enumerate([0.5, 0.9, 0.9, 0.9, 0.9], start=1):
        save_checkpoint(tmp_path, step, tensors(step), {}, keep=1, score=score)
    assert names(tmp_path) == ["step-000002", "step-000005"]


def test_a_new_checkpoint_outlives_damaged_ones_of_later_steps(tmp_path: Path) -> None:
    for step, score in ((10, 0.5), (20, 0.9)):
        save_checkpoint(tmp_path, step, tensors(step), {}, keep=1, score=score)
    (tmp_path / "checkpoints" / "step-000020" / "state.safetensors").write_bytes(b"damaged")
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 15, tensors(15), {}, keep=1, score=0.6)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[0] == 15


def test_a_step_that_is_saved_again_replaces_the_old(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, {"policy/b": torch.zeros(1)}, {"beta": 0.0})
    save(tmp_path, 3)
    assert_is(load_checkpoint(tmp_path), 3)
    assert names(tmp_path) == ["step-000003"]


def test_what_a_kill_left_half_written_is_neither_loaded_nor_in_the_way(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / "checkpoints" / ".step-000002.tmp"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    assert_is(load_checkpoint(tmp_path), 1)
    save(tmp_path, 2)
    assert_is(load_checkpoint(tmp_path), 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("position", [0, 9, 150, -1])  # length of the header, the header, tensors
def test_a_flipped_bit_in_the_tensors(position: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, 2)
    flip(tmp_path / "checkpoints/step-000002/state.safetensors", position)
    assert_is(load_checkpoint(tmp_path), 1)
    assert f"{tmp_path}/checkpoints/step-000002 is damaged (" in capsys.readouterr().err.replace("\n", "")


def test_a_flipped_bit_anywhere_in_the_state(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "checkpoints/step-000002/state.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        flip(path, position)
        loaded = load_checkpoint(tmp_path)
        # White space between the keys may change; what they say may not.
        if loaded is None or loaded[0] != 2:
            assert_is(loaded, 1)
        else:
            assert whole[position : position + 1].isspace()
            assert_is(loaded, 2)
        path.write_bytes(whole)


@pytest.mark.parametrize("damage", ["short", "empty", "no tensors", "no state", "nothing", "a list", "no checksum"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints/step-000002"
    state, data = folder / "state.json", folder / "state.safetensors"
    if damage == "short":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "empty":
        data.write_bytes(b"")
    elif damage == "a list":
        state.write_text("[1, 2]")
    elif damage == "no checksum":
        state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k != "sha256"}))
    else:
        gone = {"no tensors": [data], "no state": [state], "nothing": [data, state]}[damage]
        for path in gone:
            path.unlink()
    assert_is(load_checkpoint(tmp_path), 1)
    assert f"{folder} is damaged (" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "checkpoints/step-000001")
    assert load_checkpoint(tmp_path) is None


def test_prefixes_take_apart_what_they_put_together() -> None:
    policy, value = {"a": torch.zeros(1), "b/c": torch.ones(1)}, {"a": torch.full((1,), 2.0)}
    both = with_prefix("policy/", policy) | with_prefix("value/", value) | with_prefix("value_2/", policy)
    assert sorted(both) == ["policy/a", "policy/b/c", "value/a", "value_2/a", "value_2/b/c"]
    assert without_prefix("policy/", both) == policy
    assert without_prefix("value/", both) == value
