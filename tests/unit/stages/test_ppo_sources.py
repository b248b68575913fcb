"""PPO with several sources: what is logged, running statistics over a stop, and by what the evaluation normalises."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pe_rlhf.config import Recipe
from pe_rlhf.scoring.model_judges import make_judge
from pe_rlhf.stages.pipeline import run_recipe
from pe_rlhf.system.files import write_jsonl
from reward.judges import Comparison
from reward.judges.judge_settings import JudgeSettings
from tests.failures import raises
from tests.runs import Tree, read_jsonl
from tests.stage_support import byte_model, run, write_prompts

PROMPTS = [f"Prompt {i}:" for i in range(10)]
LENGTH: Tree = {"function": "reward.scores:length"}


def recipe(folder: Path, *sources: Tree, **settings: Any) -> Tree:
    """Four steps on a byte model whose every twelfth byte ends a response."""
    model = byte_model(folder / "model", pad_is_eos=True, initializer_range=0.3, eos_token_id=list(range(0, 258, 12)))
    ppo = {
        "prompts": write_prompts(folder / "prompts.jsonl", PROMPTS),
        "reward": list(sources),
        "rollout": {"max_new_tokens": 8},
        "steps": 4,
        "batch_size": 6,
        "checkpoint_every": 1,
        "learning_rate": 1e-2,
        **settings,
    }
    return {"model": str(model), "adapter": {"rank": 2, "alpha": 4}, "threads": 1, "ppo": ppo}


def metrics(run_dir: Path) -> list[Tree]:
    lines = read_jsonl(run_dir / "ppo" / "metrics.jsonl")
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def test_a_normalised_reward_follows_from_the_logged_figures_of_its_source(tmp_path: Path) -> None:
    run(recipe(tmp_path, {**LENGTH, "normalise": "running", "weight": 0.5}), tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert lines[0]["reward"] == pytest.approx(0, abs=1e-6)
    assert lines[0]["reward_std"] == pytest.approx(0.5, rel=1e-5)
    means = np.array([line["source_length"] for line in lines])
    squares = np.array([line["source_length_std"] ** 2 for line in lines]) + means**2
    for t, line in enumerate(lines):  # batches of one size
        mean = means[: t + 1].mean()
        deviation = np.sqrt(squares[: t + 1].mean() - mean**2)
        assert line["reward"] == pytest.approx(0.5 * (means[t] - mean) / deviation, abs=1e-4)
    summary = json.loads((tmp_path / "run" / "ppo" / "summary.json").read_text())
    assert summary["moments"]["length"][:2] == pytest.approx([24, means.mean()])


@pytest.mark.parametrize("streams", [False, True])
def test_a_run_that_is_stopped_goes_on_with_its_statistics(
    streams: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source fails in the third step, whose rollout is scored again by the run that goes on.

    The prompts of one that streams are drawn from a buffer; a folder stands for the hub, which is not there.
    """
    (tmp_path / "failing.py").write_text(
        "calls = [0]\n"
        "def score(prompts, responses):\n"
        "    calls[0] += 1\n"
        "    return [float(len(r)) for r in responses] if calls[0] != 3 else None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "failing", raising=False)  # it counts its calls
    source = {**LENGTH, "name": "it", "normalise": "running", "clip": 2.0}
    # The first source has taken in the step before the second one fails.
    whole = recipe(tmp_path, source, {**LENGTH, "name": "other", "weight": 0.1})
    failing = recipe(tmp_path, source, {"function": "failing:score", "name": "other", "weight": 0.1})
    if streams:
        (tmp_path / "hub").mkdir()
        write_prompts(tmp_path / "hub" / "train.jsonl", [f"Prompt {i}:" for i in range(200)])
        load = datasets.load_dataset
        monkeypatch.setattr(datasets, "load_dataset", lambda path, **of: load(str(tmp_path / "hub"), **of))
        data = {"path": "some/set", "split": "train[:40]", "streaming": True, "shuffle_buffer": 50}
        whole["ppo"]["prompts"] = failing["ppo"]["prompts"] = data
    whole["ppo"]["samples_every"] = failing["ppo"]["samples_every"] = 1
    run(whole, tmp_path / "whole")
    with raises("user_code", step=3):
        run(failing, tmp_path / "stopped")
    run_recipe(Recipe.model_validate(failing), tmp_path / "stopped", ["ppo"], "resume")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    sampled = [read_jsonl(tmp_path / name / "ppo" / "samples.jsonl") for name in ("whole", "stopped")]
    assert sampled[0] == sampled[1]
    numbers = [int(row["prompt"][7:-1]) for row in sampled[0]]
    assert (max(numbers) >= 40) is streams
    states = [load_file(tmp_path / name / "ppo" / "adapter" / "role.safetensors") for name in ("whole", "stopped")]
    assert all((states[0][name] == states[1][name]).all() for name in states[0])


@pytest.mark.page
def test_the_evaluation_normalises_by_the_statistics_that_ppo_ended_with(tmp_path: Path) -> None:
    tree = recipe(tmp_path, {**LENGTH, "normalise": "running"}, {**LENGTH, "name": "plain", "weight": 0.25})
    prompts = write_prompts(tmp_path / "held.jsonl", ["One:", "Two:", "Three:"])
    tree["evaluate"] = {"prompts": prompts, "judge": "length", "sampling": {"max_new_tokens": 8}}
    found = run(tree, tmp_path / "run")
    count, mean, squares = found["ppo"]["moments"]["length"]
    assert count == 24
    for side in ("policy", "anchor"):
        length = found["evaluate"][f"source_length_{side}"]
        assert length == pytest.approx(found["evaluate"][f"source_plain_{side}"])
        expected = (length - mean) / (squares / count) ** 0.5 + 0.25 * length
        assert found["evaluate"][f"reward_{side}"] == pytest.approx(expected, rel=1e-4)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Reward of length" in page
    assert "Reward of plain" in page


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}"
    "{% endfor %}"
)


def test_a_prompt_that_a_reward_models_own_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    """Of those that the model scores: the policy's template takes it, and training had begun when it was read."""
    tree = recipe(tmp_path, {**LENGTH, "weight": 0.1}, steps=1)
    tokenizer = AutoTokenizer.from_pretrained(tree["model"])
    AutoModelForSequenceClassification.from_pretrained(tree["model"], num_labels=1, pad_token_id=0).save_pretrained(
        tmp_path / "rm"
    )
    tokenizer.chat_template = NO_SYSTEM
    tokenizer.save_pretrained(tmp_path / "rm")
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": prompt, "to": "model"} for prompt in (*PROMPTS, system)] + [{"prompt": system, "to": "length"}]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    source = {"model": str(tmp_path / "rm"), "where": {"to": "model"}}
    tree["ppo"] |= {"reward": [source, {**LENGTH, "weight": 0.1}], "max_bad_share": 0.1}
    run(tree, tmp_path / "run")
    (left_out,) = read_jsonl(tmp_path / "run" / "ppo" / "left_out_prompts.jsonl")
    assert left_out["row"] == 11
    assert str(tmp_path / "rm") in left_out["reason"]
    tree["ppo"]["max_bad_share"] = 0.05
    with raises("user_code"):
        run(tree, tmp_path / "refused")
    assert not (tmp_path / "refused" / "ppo" / "metrics.jsonl").exists()
    judge = make_judge(JudgeSettings(kind="reward_model", target=str(tmp_path / "rm")))
    refused, scored = judge.compare([Comparison(prompt, "a", "b") for prompt in (system, "Hi")])
    assert (refused.invalid is None, scored.invalid) == (False, None)


def test_arguments_of_a_function(tmp_path: Path) -> None:
    source = {"function": "reward.scores:length_penalty", "arguments": {"limit": 4, "buffer": 4, "unit": "characters"}}
    run(recipe(tmp_path, source, steps=1), tmp_path / "run")
    samples = read_jsonl(tmp_path / "run" / "ppo" / "samples.jsonl")
    assert [row["score"] for row in samples] == [-min(1.0, len(row["response"]) / 4) for row in samples]
    for wrong, kind in (({"limmit": 4}, "user_code"), ({"prompts": []}, "user_code")):
        with raises(kind):  # type: ignore[arg-type]
            run(recipe(tmp_path, {**source, "arguments": wrong}), tmp_path / "wrong")
    with raises("invalid", key="ppo.reward.arguments"):
        run(recipe(tmp_path, {**source, "arguments": {"unit": "lines"}}), tmp_path / "wrong_value")


def test_a_judge_compares_with_the_anchor_and_a_run_that_is_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge is asked nothing twice, and the numbers are those of the run that was not stopped."""
    (tmp_path / "stopping_judge.py").write_text(
        "calls, asked, at = [0], [], [None]\n"
        "def judge(prompts, a, b):\n"
        "    calls[0] += 1\n"
        "    if calls[0] == at[0]:\n"
        "        raise RuntimeError('gone')\n"
        "    asked.extend(zip(prompts, a, b))\n"
        "    return [(1 + len(x)) / (2 + len(x) + len(y)) for x, y in zip(a, b)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import stopping_judge  # type: ignore[import-not-found]

    tree = recipe(tmp_path, {"judge": "stopping_judge:judge"}, {**LENGTH, "weight": 0.01}, steps=3)
    run(tree, tmp_path / "whole")
    assert len(stopping_judge.asked) == len(set(stopping_judge.asked))
    responses = read_jsonl(tmp_path / "whole" / "ppo" / "anchor_responses.jsonl")
    assert 6 <= len(responses) <= len(PROMPTS)
    whole = list(stopping_judge.asked)
    stopping_judge.asked.clear()
    stopping_judge.calls[0], stopping_judge.at[0] = 0, 2
    with raises("user_code", step=2):
        run(tree, tmp_path / "stopped")
    run_recipe(Recipe.model_validate(tree), tmp_path / "stopped", ["ppo"], "resume")
    assert sorted(stopping_judge.asked) == sorted(whole)
    for one, other in zip(metrics(tmp_path / "stopped"), metrics(tmp_path / "whole"), strict=True):
        assert one | {"source_judge_asked": 0} == other | {"source_judge_asked": 0}
    # What the anchor answers does not depend on the step or on what is beside it.
    assert sorted(map(str, read_jsonl(tmp_path / "stopped" / "ppo" / "anchor_responses.jsonl"))) == sorted(
        map(str, responses)
    )
    lines = metrics(tmp_path / "whole")
    assert all(0 < line["source_judge"] < 1 for line in lines)


def test_a_judge_that_compares_with_a_column_that_is_not_there(tmp_path: Path) -> None:
    with raises("missing", key="ppo.reward.against"):
        run(recipe(tmp_path, {"judge": "length", "against": "gold"}), tmp_path / "run")
    with raises("unknown", key="judge"):
        run(recipe(tmp_path, {"judge": "lenght"}), tmp_path / "run")
