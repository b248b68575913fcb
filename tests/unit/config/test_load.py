"""Recipes: what is in the file, what is left out, what overrides change, and where data is looked for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pe_rlhf.config import LoRAConfig, PPOConfig, Recipe
from pe_rlhf.config.load import bundled, find_recipe, load_recipe, read_tree, save_recipe
from reward.errors import InputError, Kind
from tests.failures import raises
from tests.paths import ROOT
from tests.runs import recipe, write_recipe

ALL = ("preferences", "reward", "ppo", "evaluate")


def load(folder: Path, *overrides: str, **changes: Any) -> Recipe:
    return load_recipe(write_recipe(folder, recipe(*ALL, **changes)), list(overrides))


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    assert (loaded.name, loaded.seed, loaded.chat_template, loaded.threads) == ("recipe", 0, "auto", None)
    assert loaded.stages == list(ALL)
    ppo, reward = loaded.ppo, loaded.reward
    assert ppo is not None
    assert reward is not None
    # The settings that PPO papers agree on.
    assert (ppo.gamma, ppo.lam, ppo.clip_range, ppo.value_clip_range) == (1, 0.95, 0.2, 0.2)
    assert (ppo.kl.form, ppo.kl.estimator, ppo.kl.place, ppo.kl.controller) == ("convex", "k1", "reward", "fixed")
    assert (ppo.rollout.top_k, ppo.rollout.top_p, ppo.rollout.temperature) == (0, 1.0, 1.0)
    assert (ppo.optimizer.eps, ppo.whiten_advantages, ppo.whiten_rewards) == (1e-5, True, False)
    assert (reward.optimizer.schedule, ppo.optimizer.schedule) == ("linear", "constant")
    assert (reward.optimizer.warmup_ratio, reward.optimizer.eps) == (0.05, 1e-8)


def test_a_section_that_is_named_in_part_keeps_its_own_defaults(tmp_path: Path) -> None:
    reward = load(tmp_path, "reward.optimizer.max_grad_norm=3").reward
    assert reward is not None
    settings = reward.optimizer
    assert (settings.max_grad_norm, settings.schedule, settings.warmup_ratio, settings.eps) == (3, "linear", 0.05, 1e-8)


def test_the_kl_in_the_loss_has_an_estimator_whose_gradient_knows_the_anchor(tmp_path: Path) -> None:
    ppo = load(tmp_path, "ppo.kl.place=loss").ppo
    assert ppo is not None
    assert ppo.kl.estimator == "k2"
    with raises("conflict", key="ppo.kl.estimator"):
        load(tmp_path, "ppo.kl.place=loss", "ppo.kl.estimator=k1")


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("evaluate.judge.concurrency=x", "invalid"),
        ("evaluate.judge.verdict=prob", "invalid"),
        ("evaluate.judge.verdikt=text", "unknown"),
    ],
)
def test_a_mistake_in_a_section_that_could_be_a_name_is_told_where_it_is(
    tmp_path: Path, override: str, kind: Kind
) -> None:
    with raises(kind, key=override.partition("=")[0]):
        load(tmp_path, "evaluate.judge={kind: llm, target: m}", override)


def test_an_adaptive_beta_cannot_start_at_zero(tmp_path: Path) -> None:
    with raises("conflict", key="ppo.kl.controller"):
        load(tmp_path, "ppo.kl.controller=adaptive", "ppo.kl.beta=0")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_resolved_recipe_is_the_recipe(path: Path, tmp_path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.name == path.stem
    save_recipe(loaded, tmp_path / "resolved.yaml")
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again == loaded
    # It holds every key, so that a later version with other defaults still means the same.
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text()) == loaded.model_dump(mode="json")
    save_recipe(again, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "resolved.yaml").read_bytes()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_head_of_a_bundled_recipe_says_what_to_expect(path: Path) -> None:
    head = "".join(line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.startswith("#"))
    assert [word for word in ("Hardware:", "Time:", "Expect:") if word not in head] == []


def test_a_text_with_every_kind_of_character_comes_back(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}:\n  'x' \"y\" # β → 你好\t{% endfor %}\n"
    loaded = load(tmp_path, chat_template=template)
    save_recipe(loaded, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml").chat_template == template


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("seed=3", "seed", 3),
        ("ppo.kl.beta=0.2", "ppo.kl.beta", 0.2),
        ("ppo.learning_rate=1e-3", "ppo.learning_rate", 1e-3),  # text to YAML, a number to us
        ("backbone.dtype=bfloat16", "backbone.dtype", "bfloat16"),  # a section that the file does not have
        ("reward.optimizer.betas=[0.8, 0.99]", "reward.optimizer.betas", (0.8, 0.99)),
        ("adapter.targets=[q_proj, v_proj]", "adapter.targets", ["q_proj", "v_proj"]),
        ("adapter.targets=attention", "adapter.targets", "attention"),
        ("ppo.kl={beta: 0.3, form: penalty}", "ppo.kl.form", "penalty"),
        ("ppo.prompts.split=train[:3]", "ppo.prompts.split", "train[:3]"),  # the file has only a path
        ("ppo.prompts.columns.prompt=question", "ppo.prompts.columns", {"prompt": "question"}),
        ("ppo.kl.limit=null", "ppo.kl.limit", None),
        ("ppo.whiten_advantages=false", "ppo.whiten_advantages", False),
        ('chat_template="{{ a == b }}"', "chat_template", "{{ a == b }}"),  # the first = is ours
    ],
)
def test_overrides(tmp_path: Path, override: str, path: str, expected: Any) -> None:
    value: Any = load(tmp_path, override)
    for part in path.split("."):
        value = getattr(value, part)
    assert value == expected


def test_a_later_override_wins_and_one_keeps_its_neighbours(tmp_path: Path) -> None:
    loaded = load(tmp_path, "ppo.kl.beta=0.2", "ppo.kl.form=penalty", "ppo.kl.beta=0.4", ppo__kl__estimator="k3")
    assert loaded.ppo is not None
    assert (loaded.ppo.kl.beta, loaded.ppo.kl.form, loaded.ppo.kl.estimator) == (0.4, "penalty", "k3")


def test_a_reward_source_list_as_an_override(tmp_path: Path) -> None:
    loaded = load(tmp_path, "ppo.reward=[{adapter: stage, weight: 0.5}, {function: 'reward.scores:length'}]")
    assert loaded.ppo is not None
    sources = [(source.adapter, source.function, source.weight) for source in loaded.ppo.reward]
    assert sources == [("stage", None, 0.5), (None, "reward.scores:length", 1.0)]


def test_a_stage_whose_section_is_null_does_not_run(tmp_path: Path) -> None:
    assert load(tmp_path, "evaluate=null").stages == ["preferences", "reward", "ppo"]


def test_the_adapter_of_a_stage_says_what_differs(tmp_path: Path) -> None:
    common = {"init": "pissa", "rank": 8, "alpha": 12, "targets": ["q_proj"], "scaling": "rslora", "dropout": 0.1}
    loaded = load(tmp_path, "ppo.adapter.alpha=99", adapter=common, reward__adapter={"rank": 2, "init": "lora"})
    whole = loaded.adapter.model_dump()
    assert {key: whole[key] for key in common} == common
    assert loaded.adapter_for("reward").model_dump() == whole | {"rank": 2, "init": "lora"}
    assert loaded.adapter_for("ppo").model_dump() == whole | {"alpha": 99}
    assert loaded.adapter_for("evaluate") == loaded.adapter  # it has no other
    save_recipe(loaded, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == loaded


def test_data_is_looked_for_beside_the_recipe_then_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, here, home = tmp_path / "recipes", tmp_path / "here", tmp_path / "home"
    for folder in (recipes, here, home):
        (folder / "data").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    for folder, name in ((recipes, "both"), (here, "both"), (here, "mine"), (home, "home"), (here, "pairs")):
        (folder / "data" / f"{name}.jsonl").write_text("{}")
    loaded = load(
        recipes,
        preferences__prompts="data/both.jsonl",
        ppo__prompts={"path": "data/mine.jsonl", "split": "train[:2]"},
        evaluate__prompts="~/data/home.jsonl",
        reward__data="data/absent.jsonl",
        reward__eval_data="Anthropic/hh-rlhf",
    )
    assert loaded.preferences is not None
    assert loaded.reward is not None
    assert loaded.reward.data is not None
    assert loaded.reward.eval_data is not None
    assert loaded.ppo is not None
    assert loaded.evaluate is not None
    assert loaded.preferences.prompts.path == str(recipes / "data/both.jsonl")
    assert loaded.ppo.prompts.path == str(here / "data/mine.jsonl")
    assert loaded.ppo.prompts.split == "train[:2]"
    assert loaded.evaluate.prompts.path == str(home / "data/home.jsonl")
    assert loaded.reward.data.path == "data/absent.jsonl"  # as it was written, for the message
    assert loaded.reward.eval_data.path == "Anthropic/hh-rlhf"


def test_a_recipe_by_its_path_or_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("smoke") == bundled("recipes") / "smoke.yaml"
    (tmp_path / "smoke").write_text("model: mine")
    assert find_recipe("smoke") == Path("smoke")  # a file of one's own comes first


def test_the_folder_of_a_run_is_no_recipe_and_has_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: a/b\n")
    with raises("invalid", key="RECIPE", fix=f"its recipe is {tmp_path / 'recipe.yaml'}"):
        find_recipe(str(tmp_path))


def test_the_schema_describes_every_key() -> None:
    schema = Recipe.model_json_schema()
    sections = {"Recipe": schema, **schema["$defs"]}
    assert {"PPOConfig", "RewardConfig", "PreferencesConfig", "EvaluateConfig", "KLConfig"} <= sections.keys()
    for name, section in sections.items():
        assert section["additionalProperties"] is False, name
        assert section["description"], name
        assert section["properties"], name


def test_the_default_of_one_recipe_is_not_shared_with_another(tmp_path: Path) -> None:
    first, second = load(tmp_path), load(tmp_path)
    assert first.ppo is not None
    assert second.ppo is not None
    first.ppo.kl.beta = 0.9
    first.ppo.reward[0].weight = 7.0
    assert second.ppo.kl.beta == 0.05
    assert load(tmp_path).ppo == second.ppo


def test_the_options_of_an_init_are_checked(tmp_path: Path) -> None:
    loaded = load(tmp_path, "adapter.init=lora_ga", "adapter.init_options.gamma=4", "ppo.adapter={init: pissa}")
    common, of_ppo = loaded.adapter, loaded.adapter_for("ppo")
    assert isinstance(common, LoRAConfig)
    assert isinstance(of_ppo, LoRAConfig)
    assert common.init_options == {"gamma": 4}
    assert of_ppo.init_options == {}  # not those of another init
    for init, override in (("lora_ga", "gama=4"), ("pissa", "niter=0")):
        with pytest.raises(InputError):
            load(tmp_path, f"adapter.init={init}", f"adapter.init_options.{override}")


def test_a_key_may_stand_in_front_of_a_merged_one(tmp_path: Path) -> None:
    """Also where another mapping merges that one in its turn before it is made, which puts the key there twice."""
    path = tmp_path / "merged.yaml"
    path.write_text("a: {b: &mine {<<: {x: 1}, x: 2}}\nc: {<<: *mine, y: 3}\n")
    assert read_tree(path) == {"a": {"b": {"x": 2}}, "c": {"x": 2, "y": 3}, "name": "merged"}


def test_the_weight_of_the_critics_loss_is_taken_and_said_to_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Recipes that earlier versions saved have it, most of them at its default."""
    for value, words in ((0.1, 0), (0.7, 1), (0.7, 0)):
        config = PPOConfig.model_validate({"prompts": "p.jsonl", "value_coefficient": value})
        assert config == PPOConfig.model_validate({"prompts": "p.jsonl"})
        said = capsys.readouterr()
        assert (said.out + said.err).count("ppo.value_coefficient") == words


@pytest.mark.parametrize(
    ("key", "section"), [("ppo.reward.0.url", {"url": "host:1"}), ("ppo.reward.0.judge.base_url", None)]
)
def test_the_key_of_a_field_is_named_once(tmp_path: Path, key: str, section: Any) -> None:
    tree = recipe("ppo")
    tree["ppo"]["reward"] = [section or {"judge": {"kind": "llm:m", "base_url": "host:1"}}]
    with raises("invalid", key=key):
        load_recipe(write_recipe(tmp_path, tree))
