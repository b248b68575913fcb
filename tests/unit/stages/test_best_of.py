"""The best of n: its KL by hand, and an evaluation whose choice is made again from the samples."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pe_rlhf.algo.kl import best_of_kl
from pe_rlhf.config import SamplingConfig
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.runs.saved_roles import save_role
from pe_rlhf.system.seeding import derive_seed
from tests.runs import Tree, read_jsonl
from tests.stage_support import byte_model, run, write_prompts
from tests.tiny import perturb

PROMPTS = ["One:", "Two:", "Three:", "Four:"]


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_kl_of_the_best_of_n(n: int) -> None:
    """Σ p log(p/q) over ten thousand equally likely outcomes in order: the best of n is number k with
    (k/N)^n − ((k−1)/N)^n."""
    edges = np.arange(10_001) / 10_000
    p = np.diff(edges**n)
    exact = float((p[p > 0] * np.log(p[p > 0] * 10_000)).sum())
    assert best_of_kl(n) == pytest.approx(exact, abs=1e-3)
    assert best_of_kl(n) == pytest.approx(math.log(n) - 1 + 1 / n)


@pytest.mark.page
def test_the_evaluation_of_the_best_of_three(tmp_path: Path) -> None:
    model = byte_model(tmp_path / "model", pad_is_eos=True, initializer_range=0.3, eos_token_id=list(range(0, 258, 12)))
    prompts = write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    tree: Tree = {
        "model": str(model),
        "threads": 1,
        "ppo": {
            "prompts": prompts,
            "batch_size": 2,
            "reward": [{"function": "reward.scores:length", "weight": -2.0}],
            "rollout": {"max_new_tokens": 8},
        },
        "evaluate": {
            "prompts": prompts,
            "judge": "length",
            "sampling": {"max_new_tokens": 8},
            "samples_per_prompt": 2,
            "policy": {"best_of": 3},
        },
    }
    backbone = load_backbone(model)
    backbone.add_adapter("policy", rank=2)
    perturb(backbone, "policy", 0.1)
    save_role(backbone, "policy", tmp_path / "run" / "ppo" / "adapter")
    (tmp_path / "run" / "ppo" / "summary.json").write_text("{}")
    summary = run(tree, tmp_path / "run", "evaluate")["evaluate"]

    engine = HFRollout(backbone, "anchor", SamplingConfig(max_new_tokens=8))
    ids = [backbone.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    rollout = engine.generate([row for row in ids for _ in range(6)], derive_seed(0, "evaluate", "best of"))
    decode = backbone.tokenizer.decode
    lengths = [len(decode(response, skip_special_tokens=True)) for response in rollout.responses]
    best = [min(lengths[i : i + 3]) for i in range(0, 24, 3)]  # the shortest, since the weight is negative
    anchor = [len(row["response_anchor"]) for row in read_jsonl(tmp_path / "run" / "evaluate" / "samples.jsonl")]
    assert summary["best_of"] == 3
    assert summary["reward_best_of"] == pytest.approx(-2 * sum(best) / 8)
    assert summary["gold_best_of"] == pytest.approx(sum(best) / 8)
    wins = [(b > a) + (b == a) / 2 for a, b in zip(anchor, best, strict=True)]
    assert summary["best_of_win_rate"] == pytest.approx(sum(wins) / 8)
    assert summary["best_of_kl"] == pytest.approx(math.log(3) - 2 / 3)
    assert min(best) < max(best)
    verdicts = read_jsonl(tmp_path / "run" / "evaluate" / "best_of_verdicts.jsonl")
    assert len(verdicts) == 8
    assert "Best of 3" in (tmp_path / "run" / "report.html").read_text()
