"""The evaluate stage: what it measures of a policy that is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pe_rlhf.config import Recipe, SamplingConfig
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.runs.saved_roles import save_role
from pe_rlhf.stages import evaluate
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.evaluate import mean_scores
from pe_rlhf.system.seeding import derive_seed
from reward.judges import Verdict
from reward.summary import Outcome
from reward.winrate import win_rate
from tests.runs import Tree, read_jsonl
from tests.stage_support import byte_model, write_prompts
from tests.tiny import perturb

PROMPTS = [f"Prompt {i}:" for i in range(40)]
SEED = 2


def evaluated(
    folder: Path, judge: str, *, size: float = 0.0, texts: list[Any] = PROMPTS, **settings: Any
) -> tuple[Tree, list[Tree], Backbone]:
    """Evaluate a policy that was moved by `size` from the anchor: the summary, all samples, and the backbone."""
    model = byte_model(folder / "model", pad_is_eos=True, initializer_range=0.3, eos_token_id=list(range(0, 258, 12)))
    backbone = load_backbone(model)
    backbone.add_adapter("policy", init="pissa", rank=2)
    perturb(backbone, "policy", size)
    run_dir = folder / "run"
    (run_dir / "evaluate").mkdir(parents=True)
    save_role(backbone, "policy", run_dir / "ppo" / "adapter")
    prompts = write_prompts(folder / "prompts.jsonl", texts)
    tree = {
        "model": str(model),
        "seed": SEED,
        "ppo": {"prompts": prompts, "reward": [{"function": "reward.scores:length", "weight": 2.0}]},
        "evaluate": {"prompts": prompts, "judge": judge, "sampling": {"max_new_tokens": 12}, **settings},
    }
    summary = evaluate.run(StageContext(Recipe.model_validate(tree), run_dir, "evaluate"))
    assert json.loads((run_dir / "evaluate" / "summary.json").read_text()) == summary
    return summary, read_jsonl(run_dir / "evaluate" / "samples.jsonl"), backbone


def judge_module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> str:
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    return f"{name}:score"


def test_a_policy_equal_to_the_anchor(tmp_path: Path) -> None:
    summary, rows, _ = evaluated(tmp_path, "reward.scores:length")
    assert abs(summary["kl"]) < 1e-5
    assert summary["ci_low"] < 0.5 < summary["ci_high"]
    assert summary["n"] == len(rows) == 40
    assert [row["response_policy"] for row in rows] != [row["response_anchor"] for row in rows]  # own samples each


def test_a_chat_is_readable_in_the_table(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": f"Hello {i}"}] for i in range(3)]
    longer = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why | how?"}]
    evaluated(tmp_path, "reward.scores:length", texts=[*chats, longer])
    table = (tmp_path / "run" / "evaluate" / "samples.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:5]] == [f"| Hello {i}" for i in range(3)]
    assert table[5].startswith("| system: Be brief. user: Why \\| how? | ")


def test_the_numbers_are_those_of_the_samples(tmp_path: Path) -> None:
    summary, rows, _ = evaluated(tmp_path, "reward.scores:length", size=0.2)
    lengths = {role: [len(row[f"response_{role}"]) for row in rows] for role in ("policy", "anchor")}
    signs = [(p > a) - (p < a) for p, a in zip(lengths["policy"], lengths["anchor"], strict=True)]
    counts = (signs.count(1), signs.count(0), signs.count(-1))
    assert (summary["wins"], summary["ties"], summary["losses"]) == counts
    assert sum(counts) == summary["n"] == 40
    assert min(counts) > 0
    assert summary["win_rate"] == pytest.approx((counts[0] + counts[1] / 2) / 40)
    assert [row["preference"] for row in rows] == [0.5 + sign / 2 for sign in signs]
    for role, values in lengths.items():
        assert [row[f"score_{role}"] for row in rows] == values
        assert summary[f"gold_{role}"] == pytest.approx(sum(values) / 40)
        assert summary[f"reward_{role}"] == pytest.approx(2 * sum(values) / 40)
    assert [row["prompt"] for row in rows] == PROMPTS


def test_the_kl_is_that_of_the_policy_s_samples(tmp_path: Path) -> None:
    temperature = 0.8
    sampling = {"max_new_tokens": 12, "temperature": temperature}
    summary, _, backbone = evaluated(tmp_path, "reward.scores:length", size=0.2, sampling=sampling)
    engine = HFRollout(backbone, "policy", SamplingConfig.model_validate(sampling))
    prompt_ids = [backbone.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    rollout = engine.generate(prompt_ids, derive_seed(SEED, "evaluate", "policy"))
    total = 0.0
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        logprobs = {}
        for role in ("policy", "anchor"):
            with torch.no_grad(), backbone.role(role):
                logits_TV = backbone(torch.tensor([prompt + response])).logits[0]
            logprobs[role] = torch.log_softmax(logits_TV / temperature, dim=-1)
        for t, token in enumerate(response, start=len(prompt) - 1):
            total += float(logprobs["policy"][t, token] - logprobs["anchor"][t, token])
    assert summary["kl"] == pytest.approx(total / 40, rel=1e-3)
    assert summary["kl"] > 0.1
    assert summary["mean_length_policy"] == pytest.approx(sum(map(len, rollout.responses)) / 40)


@pytest.mark.parametrize(("first", "second", "rate"), [("1.0", "0.0", 1.0), ("0.0", "1.0", 0.0), ("1.0", "1.0", 0.5)])
def test_a_judge_of_one_mind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str, rate: float
) -> None:
    """A judge is asked once: the policy's responses first, then the anchor's."""
    source = f"def score(prompts, responses):\n    n = len(responses) // 2\n    return [{first}] * n + [{second}] * n\n"
    judge = judge_module(tmp_path, monkeypatch, f"of_one_mind_{rate:.0%}".replace("%", ""), source)
    summary, _, _ = evaluated(tmp_path, judge)
    assert summary["win_rate"] == rate
    counts = {1.0: (40, 0, 0), 0.5: (0, 40, 0), 0.0: (0, 0, 40)}
    assert (summary["wins"], summary["ties"], summary["losses"]) == counts[rate]
    assert summary["ci_low"] <= rate <= summary["ci_high"]
    assert (summary["gold_policy"], summary["gold_anchor"]) == (float(first), float(second))


def test_samples_of_a_prompt_are_a_cluster(tmp_path: Path) -> None:
    summary, rows, _ = evaluated(tmp_path, "reward.scores:length", size=0.2, samples_per_prompt=2)
    assert summary["n"] == len(rows) == 80
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert any(a["response_policy"] != b["response_policy"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    preferences = [row["preference"] for row in rows]
    clustered = win_rate(preferences, [i // 2 for i in range(80)])
    assert (summary["ci_low"], summary["ci_high"]) == pytest.approx((clustered.ci_low, clustered.ci_high))
    single = win_rate(preferences)
    assert (summary["ci_low"], summary["ci_high"]) != pytest.approx((single.ci_low, single.ci_high))


def test_a_prompt_that_stands_there_twice_is_a_cluster(tmp_path: Path) -> None:
    summary, rows, _ = evaluated(tmp_path, "reward.scores:length", size=0.2, texts=[*PROMPTS[:15], *PROMPTS[:15]])
    assert [row["prompt"] for row in rows] == [*PROMPTS[:15], *PROMPTS[:15]]
    preferences = [row["preference"] for row in rows]
    clustered, single = win_rate(preferences, [i % 15 for i in range(30)]), win_rate(preferences)
    assert (summary["ci_low"], summary["ci_high"]) == pytest.approx((clustered.ci_low, clustered.ci_high))
    assert (summary["ci_low"], summary["ci_high"]) != pytest.approx((single.ci_low, single.ci_high))


def test_the_table_has_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    _, rows, _ = evaluated(tmp_path, "reward.scores:length", table_rows=5)
    lines = (tmp_path / "run" / "evaluate" / "samples.md").read_text().split("\n")
    assert lines[:2] == ["| prompt | policy | anchor | policy wins |", "|---|---|---|---|"]
    assert len([line for line in lines[2:] if line]) == 5
    for line, row in zip(lines[2:7], rows[:5], strict=True):
        assert line.startswith(f"| {row['prompt']} |")
        assert line.replace("\\|", "").count("|") == 5


def test_mean_scores_are_of_those_that_were_given() -> None:
    def outcome(a: float | None, b: float | None) -> Outcome:
        return Outcome((Verdict(0.5, score_a=a, score_b=b),))

    outcomes = [outcome(1.0, None), outcome(None, None), outcome(4.0, None)]
    assert mean_scores(outcomes) == {"policy": 2.5, "anchor": None}
    assert mean_scores([outcome(0.0, 3.0)]) == {"policy": 0.0, "anchor": 3.0}
