"""Roles as one stage hands them to the next: found from any directory of a run, refused where they are damaged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pe_rlhf.config import STAGES
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.runs.layout import ROLES, STAGE_INFO, RoleFiles, RunFiles, StageFiles
from pe_rlhf.runs.saved_roles import find_role, load_role, read_role, role_behind, save_role
from pe_rlhf.scoring.scorers import find_reward
from reward.errors import InputError
from tests.tiny import backbone_with, perturb, role_logits, tiny_model


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a reward, a policy and a critic, in the places that old runs have them in."""
    run = tmp_path_factory.mktemp("runs") / "run"
    backbone = backbone_with("policy")
    for role in ("value", "reward"):
        backbone.copy_role("policy", role)
    for role, place in {"policy": "ppo/adapter", "value": "ppo/value", "reward": "reward/adapter"}.items():
        save_role(backbone, role, run / place)
    return run


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def test_the_table_has_the_stages_of_a_recipe_in_the_order_they_run() -> None:
    assert tuple(STAGE_INFO) == STAGES
    assert tuple(ROLES) == ("policy", "value", "reward", "sft")
    places = {role: info.name + "/" + info.roles[role] for role, info in ROLES.items()}
    assert places == {"policy": "ppo/adapter", "value": "ppo/value", "reward": "reward/adapter", "sft": "sft/adapter"}


@pytest.mark.parametrize(
    ("place", "role", "found"),
    [
        (".", None, "ppo/adapter"),
        (".", "policy", "ppo/adapter"),
        (".", "value", "ppo/value"),
        (".", "reward", "reward/adapter"),
        ("ppo", None, "ppo/adapter"),
        ("ppo", "value", "ppo/value"),
        ("ppo/value", None, "ppo/value"),
        ("ppo/value", "value", "ppo/value"),
        ("reward", None, "reward/adapter"),
        ("reward/adapter", "reward", "reward/adapter"),
    ],
)
def test_a_role_is_found_from_the_directory_of_run_stage_and_adapter(
    run: Path, place: str, role: str | None, found: str
) -> None:
    assert find_role(run / place, role).folder == run / found


def test_a_stage_that_was_put_aside_is_still_found(run: Path) -> None:
    (run / "ppo").rename(run / "ppo.old-1")
    assert find_role(run / "ppo.old-1", "value").folder == run / "ppo.old-1" / "value"
    assert find_role(run).role == "reward"


@pytest.mark.parametrize(
    ("place", "role", "kind", "there"),
    [
        ("reward", "policy", "missing", "it holds reward"),
        ("ppo/value", "policy", "missing", "it holds value"),
        (".", "sft", "missing", "it holds policy, value, reward"),
        (".", "polcy", "unknown", "policy, value, reward, sft"),
        ("nowhere", "policy", "missing", "is not a directory"),
        ("empty", None, "missing", "no stage that trains one has finished there"),
    ],
)
def test_what_is_there_is_said_where_the_role_is_not(
    run: Path, place: str, role: str | None, kind: str, there: str
) -> None:
    (run / "empty").mkdir()
    with pytest.raises(InputError) as raised:
        find_role(run / place, role)
    assert raised.value.kind == kind
    assert there in str(raised.value)


def test_a_word_for_a_model_is_a_run_only_where_it_is_a_directory_of_one(run: Path) -> None:
    (run / "model").mkdir()
    (run / "a.jsonl").write_text("")
    for name in ("org/model", "http://host/v1#m", str(run / "model"), str(run / "a.jsonl"), str(run / "nowhere")):
        assert role_behind(name, "policy") is None
    found = role_behind(str(run), "policy")
    assert found is not None
    assert (found.role, found.recipe) == ("policy", None)
    unfinished = run / "unfinished"
    unfinished.mkdir()
    RunFiles(unfinished).recipe.write_text("model: x")
    with pytest.raises(InputError) as raised:
        role_behind(str(unfinished), "policy")
    assert (raised.value.kind, raised.value.file) == ("missing", str(unfinished))


@pytest.mark.parametrize("place", [".", "reward", "reward/adapter"])
def test_a_recipe_names_a_reward_adapter_by_any_directory_that_has_it(run: Path, place: str) -> None:
    assert find_reward(str(run / place), Path("elsewhere")).folder == run / "reward/adapter"
    assert find_reward("stage", run).folder == run / "reward/adapter"
    with pytest.raises(InputError) as raised:
        find_reward(str(run / "ppo"), run)
    assert (raised.value.kind, raised.value.key) == ("missing", "ppo.reward.adapter")


# ---- from one stage to the next --------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["policy", "value", "reward"])
@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_a_role_goes_from_one_stage_to_the_next(role: str, init: str, tmp_path: Path) -> None:
    before = backbone_with(role, init=init)
    perturb(before, role)
    save_role(before, role, tmp_path / "adapter")
    after = backbone_with()
    load_role(after, role, tmp_path / "adapter")
    assert torch.equal(role_logits(after, role), role_logits(before, role))
    assert not torch.allclose(role_logits(after, role), role_logits(backbone_with(role, init=init), role), atol=1e-3)
    assert after.specs[role] == before.specs[role]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        *("adapter_config.json", "adapter_model.safetensors"),
        *("role.json", "role.safetensors"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_role_under_another_name_and_saved_again(tmp_path: Path) -> None:
    backbone = backbone_with("reward")
    save_role(backbone, "reward", tmp_path / "adapter")
    perturb(backbone, "reward")
    backbone.head("reward").shift(0.25)
    save_role(backbone, "reward", tmp_path / "adapter")
    load_role(backbone, "reward_2", tmp_path / "adapter")
    assert torch.equal(role_logits(backbone, "reward_2"), role_logits(backbone, "reward"))


def test_the_files_of_a_role_hold_no_base_weight(tmp_path: Path) -> None:
    backbone = backbone_with("value")
    save_role(backbone, "value", tmp_path / "adapter")
    parts = {name.rsplit(".", 1)[-1] for name in load_file(tmp_path / "adapter" / "role.safetensors")}
    base = {name.rsplit(".", 1)[-1] for name, _ in tiny_model("llama").named_parameters()}
    assert {"lora_A", "lora_B", "bias"} <= parts
    heads = {"weight"}  # the head's own
    assert parts & (base - heads) == set()
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert size < 4 * sum(p.numel() for p in tiny_model("llama").parameters())


# ---- damage ----------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "role": "policy",
    "base_model": "b",
    "base_sha256": "0",
    "spec": {"init": "lora", "rank": 2, "alpha": 4, "scaling": "lora", "dropout": 0.0, "modules": ["a"]},
}
BAD_DESCRIPTIONS = {
    "cut": json.dumps(GOOD)[:-9],
    "a list": "[1, 2]",
    "a number": "7",
    "null": "null",
    "not UTF-8": b"\xff\xfe\x00".decode("latin-1"),
    "nested": "[" * 20_000,
    "empty": "",
    "nothing in it": "{}",
    "no role": json.dumps({k: v for k, v in GOOD.items() if k != "role"}),
    "no spec": json.dumps({k: v for k, v in GOOD.items() if k != "spec"}),
    "role is a number": json.dumps(GOOD | {"role": 3}),
    "base is a list": json.dumps(GOOD | {"base_model": ["b"]}),
    "spec is a list": json.dumps(GOOD | {"spec": [1]}),
    "spec is empty": json.dumps(GOOD | {"spec": {}}),
    "spec has another key": json.dumps(GOOD | {"spec": GOOD["spec"] | {"what": 1}}),
    "rank is text": json.dumps(GOOD | {"spec": GOOD["spec"] | {"rank": "two"}}),
    "modules is a number": json.dumps(GOOD | {"spec": GOOD["spec"] | {"modules": 3}}),
}


@pytest.mark.parametrize("text", BAD_DESCRIPTIONS.values(), ids=BAD_DESCRIPTIONS)
def test_a_damaged_description_is_one_input_error_that_names_the_file(text: str, run: Path) -> None:
    path = RoleFiles(run / "ppo/adapter").description
    path.write_text(text, encoding="latin-1")
    for attempt in (read_role, find_role):
        with pytest.raises(InputError) as raised:
            attempt(run / "ppo/adapter")
        assert (raised.value.kind, raised.value.file) == ("unreadable", str(path))
    assert find_role(run, "reward").role == "reward"  # what is not asked for is not looked at


def test_a_role_of_another_base_is_refused(run: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1e-3  # type: ignore[operator, index]
    other = load_backbone(model)
    with pytest.raises(InputError) as raised:
        load_role(other, "policy", run / "ppo/adapter")
    assert (raised.value.kind, raised.value.file) == ("changed", str(run / "ppo/adapter"))
    assert other.roles == ["anchor"]


@pytest.mark.parametrize("damage", ["rank", "modules", "tensors cut", "tensors missing", "other tensors"])
def test_a_role_whose_files_do_not_fit_each_other_is_refused(damage: str, run: Path) -> None:
    files = RoleFiles(run / "ppo/adapter")
    if damage == "tensors missing":
        files.tensors.unlink()
    elif damage == "tensors cut":
        files.tensors.write_bytes(files.tensors.read_bytes()[:-40])
    elif damage == "other tensors":
        files.tensors.write_bytes(b"{}")
    else:
        said = json.loads(files.description.read_text())
        said["spec"][damage] = {"rank": said["spec"]["rank"] + 1, "modules": ["model.layers.0.nothing"]}[damage]
        files.description.write_text(json.dumps(said))
    backbone = backbone_with()
    with pytest.raises(InputError) as raised:
        load_role(backbone, "policy", files.folder)
    assert str(raised.value.file).startswith(str(files.folder))
    assert backbone.roles == ["anchor"]


def test_checkpoints_are_ordered_by_step_and_other_folders_are_let_be(tmp_path: Path) -> None:
    files = StageFiles(tmp_path)
    for name in ("step-000002", "step-1000000", "step-999999", "step-abc", "step-", "other", ".step-000003.tmp"):
        (files.checkpoints / name).mkdir(parents=True)
    assert [step for step, _ in files.checkpoints_there()] == [2, 999_999, 1_000_000]
