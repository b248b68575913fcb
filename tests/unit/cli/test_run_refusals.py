"""What `pe-rlhf run` refuses in data, functions, names and models, before it writes anything or trains.

Where the failure is the user's own text, that text is looked for: it names the culprit.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.model.names import resolve_model
from pe_rlhf.system.files import locked
from reward.errors import Failure
from tests.pairwise import every_pair
from tests.runs import PAIRS, Outcome, Tree, recipe, write_jsonl, write_recipe

Fails = Callable[..., Failure]


def test_prompts_that_are_missing(fails: Fails, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo", ppo__prompts="absent.jsonl"))
    failure = fails("run", path, "--run-dir", "out")
    assert (failure.kind, failure.key, failure.file) == ("missing", "ppo.prompts", "absent.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "kind", "row"),
    [
        ([{"prompt": "p", "winner": "a", "rejected": "b"}], "missing", None),
        ([*PAIRS[:7], {**PAIRS[7], "rejected": " "}], "invalid", 8),
        ([{**pair, "rejected": pair["chosen"]} for pair in PAIRS], "invalid", 1),
    ],
)
def test_pairs_that_cannot_be_used(fails: Fails, tmp_path: Path, rows: list[Any], kind: str, row: int | None) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    failure = fails("run", write_recipe(tmp_path, recipe("reward")), "--run-dir", "out")
    assert (failure.kind, failure.key, failure.file, failure.row) == (kind, "reward.data", str(data), row)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_told_before_the_recipe_is_settled(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text("half written: [")
    path = write_recipe(tmp_path, recipe("reward", backbone__device="cuda:77"))
    with locked(tmp_path / "out"):
        failure = fails("run", path, "--run-dir", "out", "--resume", code=75)
    assert (failure.kind, failure.file) == ("in_use", "out")


def test_the_time_limit_of_a_function_is_a_setting(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(20)\n")
    start = time.monotonic()
    path = write_recipe(tmp_path, recipe("ppo", ppo__reward__0__function="slow:f", function_timeout=0.3))
    assert fails("run", path, "--dry-run").kind == "user_code"
    assert fails("run", path, "--run-dir", "out").kind == "user_code"
    outputs = write_jsonl(tmp_path / "outputs.jsonl", [{"prompt": "p", "response": "r"}])
    failure = fails("evaluate", outputs, "--against", outputs, "--judge", "slow:f", "function_timeout=0.3")
    assert failure.kind == "user_code"
    assert time.monotonic() - start < 20


def test_too_few_pairs_to_hold_any_out(fails: Fails, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS[:1])
    fails("run", write_recipe(tmp_path, recipe("reward")), "--run-dir", "out")


@every_pair(
    function=("reward.scores", "nowhere_at_all:f", "reward.scores:lenght", "math:pi", "broken_a:f", "broken_b:f"),
    key=("preferences__judge", "ppo__reward__0__function", "evaluate__judge"),
)
def test_a_function_that_cannot_be_used(fails: Fails, tmp_path: Path, key: str, function: str) -> None:
    (tmp_path / "broken_a.py").write_text("x = 1 / 0\n")
    (tmp_path / "broken_b.py").write_text("def f(:\n")
    path = write_recipe(tmp_path, recipe("preferences", "ppo", "evaluate", **{key: function}))
    assert function.partition(":")[0] in str(fails("run", path, "--dry-run"))


@pytest.mark.parametrize(
    ("body", "culprit"),
    [
        ("raise ValueError('no such\\n  thing')", "line 2"),
        ("return [1 / 0 for _ in responses]", "line 2"),
        ("raise StopIteration", "line 2"),
        ("return [float('nan') for _ in responses]", "response 0"),
        ("return [0.0] * 5 + [float('inf')] * (len(responses) - 5)", "response 5"),
        ("return [0.0]", "12"),
        ("return None", "NoneType"),
        ("return ['good' for _ in responses]", "'good'"),
        ("return [1.0] * len(responses)", "6 pairs"),  # no difference in any
    ],
)
def test_a_judge_that_fails_is_named(fails: Fails, tmp_path: Path, body: str, culprit: str) -> None:
    (tmp_path / "judge_a.py").write_text(f"def score(prompts, responses):\n    {body}\n")
    path = write_recipe(tmp_path, recipe("preferences", preferences__judge="judge_a:score"))
    said = str(fails("run", path, "--run-dir", "out"))
    assert "judge_a:score" in said
    assert culprit in said


@pytest.mark.parametrize(
    ("changes", "kind", "key"),
    [
        ({"deepspeed": "zero7"}, "unknown", "deepspeed"),
        ({"chat_template": "absent.jinja"}, "missing", "chat_template"),
        ({"chat_template": "latin.jinja"}, "unreadable", "chat_template"),
        ({"evaluate__judge": "llm"}, "missing", "judge.target"),
        ({"evaluate__judge": "llm:./nowhere"}, "missing", "judge.target"),
        ({"evaluate__judge": "length:3"}, "invalid", "judge.target"),
        ({"evaluate__judge": "reward_model"}, "missing", "judge.target"),
        ({"evaluate__judge": "reward_model:./nowhere"}, "missing", "judge.target"),
        ({"ppo__reward": [{"model": "./nowhere"}]}, "missing", "ppo.reward.model"),
        ({"ppo__reward": [{"adapter": "nowhere/reward"}]}, "missing", "ppo.reward.adapter"),
        ({"ppo__value_init": "reward"}, "missing", "ppo.value_init"),
        ({"adapter__targets": []}, "invalid", "adapter.targets"),
        ({"adapter__init": "pisa"}, "unknown", "adapter.init"),
        ({"model": "./folder"}, "missing", "model"),
        ({"model": "folder"}, "missing", "model"),
        ({"model": "pip:nothing"}, "unknown", "model"),
        ({"model": "random:tiny"}, "unknown", "model"),
    ],
)
def test_a_dry_run_finds_it_already(fails: Fails, tmp_path: Path, changes: Tree, kind: str, key: str) -> None:
    (tmp_path / "latin.jinja").write_bytes("{{ 'ü' }}".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    path = write_recipe(tmp_path, recipe("ppo", "evaluate", **changes))
    failure = fails("run", path, "--dry-run")
    assert (failure.kind, failure.key) == (kind, key)


def test_a_tracker_that_is_not_installed(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = write_recipe(tmp_path, recipe("ppo", tracking__wandb=True))
    failure = fails("run", path, "--dry-run")
    assert (failure.kind, failure.key) == ("not_installed", "tracking.wandb")


@pytest.mark.parametrize("size", [0, 7, 300])
def test_weights_that_are_cut_off(fails: Fails, tmp_path: Path, model_cache: Path, size: int) -> None:
    assert resolve_model("random:tiny-llama").startswith(str(model_cache))
    shutil.copytree(resolve_model("random:tiny-llama"), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    path = write_recipe(tmp_path, recipe("ppo", model="./model"))
    failure = fails("run", path, "--run-dir", "out")
    assert (failure.kind, failure.key, failure.file) == ("unreadable", "model", "./model")


@pytest.mark.parametrize(
    ("changes", "kind", "key"),
    [
        ({"model": "some/hub-id"}, "unreadable", "model"),
        ({"adapter__targets": ["nowhere"]}, "unknown", "adapter.targets"),
        ({"adapter__init": "pissa", "adapter__rank": 33}, "conflict", "adapter.rank"),
        ({"backbone__device": "cuda:99"}, "conflict", "backbone.device"),
        ({"backbone__device": "toaster"}, "conflict", "backbone.device"),
        ({"backbone__attention": "none_at_all"}, "unreadable", "model"),
        ({"chat_template": "{% if %}"}, "user_code", "chat_template"),
        ({"chat_template": "{{ raise_exception('no system') }}"}, "user_code", "chat_template"),
        ({"chat_template": "{{ 1 / 0 }}"}, "user_code", "chat_template"),
        ({"ppo__rollout__max_new_tokens": 600}, "too_long", "ppo.rollout.max_new_tokens"),
        ({"ppo__max_prompt_tokens": 5}, "too_long", "ppo.prompts"),
        ({"ppo__reward": [{"model": "some/hub-id"}]}, "unreadable", "ppo.reward.model"),
    ],
)
def test_what_a_model_cannot_do(fails: Fails, tmp_path: Path, changes: Tree, kind: str, key: str) -> None:
    path = write_recipe(tmp_path, recipe("ppo", **changes))
    failure = fails("run", path, "--run-dir", "out")
    assert (failure.kind, failure.key) == (kind, key)


@pytest.mark.parametrize(
    ("changes", "kind", "key"),
    [
        ({"adapter__targets": ["q_prj"]}, "unknown", "adapter.targets"),
        ({"adapter__rank": 10**9}, "conflict", "adapter.rank"),
        ({"adapter__last_layers": 3}, "conflict", "adapter.last_layers"),
        ({"ppo__adapter": {"targets": ["nowhere"]}}, "unknown", "adapter.targets"),
        ({"ppo__rollout__max_new_tokens": 512}, "too_long", "ppo.rollout.max_new_tokens"),
        ({"evaluate__sampling__max_new_tokens": 600}, "too_long", "evaluate.sampling.max_new_tokens"),
        ({"chat_template": "{% for m in messages %}"}, "user_code", "chat_template"),
        ({"chat_template": "{{ messages[0].nothing.below }}"}, "user_code", "chat_template"),
        ({"chat_template": "{{ messages.__class__.__mro__[1].__subclasses__() }}"}, "user_code", "chat_template"),
        ({"backbone__device": "cuda:99"}, "conflict", "backbone.device"),
        ({"backbone__device": "meta"}, "conflict", "backbone.device"),
        ({"model": "runs/a/b"}, "missing", "model"),
        ({"model": "model.safetensors"}, "missing", "model"),
        ({"model": "checkpoints/mdel"}, "missing", "model"),
        ({"ppo__reward": [{"function": "takes_one:f"}]}, "user_code", None),
        ({"evaluate__judge": "takes_one:f"}, "user_code", None),
    ],
)
def test_a_dry_run_asks_the_model_and_the_functions(
    fails: Fails, tmp_path: Path, changes: Tree, kind: str, key: str | None
) -> None:
    resolve_model("random:tiny-llama")
    (tmp_path / "checkpoints/model").mkdir(parents=True)
    (tmp_path / "takes_one.py").write_text("def f(prompts): return [0.0 for _ in prompts]\n")
    failure = fails("run", write_recipe(tmp_path, recipe("ppo", "evaluate", **changes)), "--dry-run")
    assert (failure.kind, failure.key) == (kind, key)


def test_a_dry_run_shows_a_prompt_of_each_stage_as_the_model_reads_it(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    resolve_model("random:tiny-llama")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    path = write_recipe(tmp_path, recipe("reward", "ppo", chat_template=template))
    outcome = cli("run", path, "--dry-run")
    assert outcome.code == 0
    shown = {line.partition(":")[0]: line for line in outcome.err.splitlines() if "as the model reads it" in line}
    assert shown.keys() == {"reward", "ppo"}
    assert "<user>Say something about the number 0" in shown["ppo"]
