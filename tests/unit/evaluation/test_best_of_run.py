"""The best of n in `pe-rlhf evaluate`: choice and KL made again from the samples, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pe_rlhf.cli.main import app
from pe_rlhf.config import SamplingConfig
from pe_rlhf.config.load import load_recipe
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.runs.saved_roles import load_role, save_role
from pe_rlhf.system.seeding import derive_seed
from reward.errors import Failure
from tests.failures import raises
from tests.runs import Outcome, Tree, read_jsonl, write_jsonl
from tests.stage_support import byte_model
from tests.tiny import perturb

ROWS = [{"prompt": f"{word}:", "gold": len(word)} for word in ("One", "Two", "Three", "Four", "Five")]
REWARD = """
def near(prompts, responses, gold):
    return [-abs(len(response) - 2 * wanted) for response, wanted in zip(responses, gold)]
"""


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a policy, whose reward is an adapter and a function of a column."""
    model = byte_model(tmp_path / "model", pad_is_eos=True, initializer_range=0.3, eos_token_id=list(range(0, 258, 12)))
    (tmp_path / "near_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    tree: Tree = {
        "name": "r",
        "model": str(model),
        "threads": 1,
        "reward": {"data": "pairs.jsonl"},
        "ppo": {
            "prompts": "prompts.jsonl",
            "reward": [{"adapter": "stage", "weight": 2.0}, {"function": "near_reward:near", "weight": 0.5}],
        },
    }
    backbone = load_backbone(model)
    for number, (role, stage) in enumerate({"policy": "ppo", "reward": "reward"}.items()):
        backbone.add_adapter(role, rank=2, seed=number)
        perturb(backbone, role, 0.1)
        save_role(backbone, role, tmp_path / "run" / stage / "adapter")
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(tree))
    return tmp_path / "run"


SETTINGS = ("--prompts", "prompts.jsonl", "--judge", "length", "sampling.max_new_tokens=8", "sampling.batch_size=7")


def evaluate(cli: Callable[..., Outcome], *more: object) -> Tree:
    outcome = cli("evaluate", "run", *SETTINGS, "--out", "e", "policy.best_of=3", *more)
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


@pytest.mark.page
def test_the_best_of_three_and_the_policys_kl(cli: Callable[..., Outcome], run_dir: Path) -> None:
    found = evaluate(cli)
    recipe = load_recipe(run_dir / "recipe.yaml")
    backbone = load_backbone(recipe.model)
    for role, stage in (("policy", "ppo"), ("reward", "reward")):
        load_role(backbone, role, run_dir / stage / "adapter")
    ids = [backbone.tokenizer(row["prompt"])["input_ids"] for row in ROWS]
    engine = HFRollout(backbone, "anchor", SamplingConfig(max_new_tokens=8))
    several = engine.generate([row for row in ids for _ in range(3)], derive_seed(0, "evaluate", "best of"))
    texts = [backbone.tokenizer.decode(row, skip_special_tokens=True) for row in several.responses]
    with backbone.role("reward"), torch.no_grad():
        learnt = [
            backbone(torch.tensor([p + r])).logits.item()
            for p, r in zip(several.prompts, several.responses, strict=True)
        ]
    scores = [
        2 * score - 0.5 * abs(len(text) - 2 * ROWS[i // 3]["gold"])
        for i, (score, text) in enumerate(zip(learnt, texts, strict=True))
    ]
    best = [max(range(i, i + 3), key=lambda k: scores[k]) for i in range(0, 15, 3)]
    rows = read_jsonl(Path("e/best_of.jsonl"))[1:]
    assert [row["response"] for row in rows] == [texts[k] for k in best]
    assert [row["score"] for row in rows] == pytest.approx([scores[k] for k in best], abs=1e-4)
    assert found["reward_best_of"] == pytest.approx(sum(scores[k] for k in best) / 5, abs=1e-4)
    anchor = [len(row["response"]) for row in read_jsonl(Path("e/baseline.jsonl"))[1:]]
    chosen = [len(texts[k]) for k in best]
    assert found["best_of_win_rate"] == sum((b > a) + (b == a) / 2 for a, b in zip(anchor, chosen, strict=True)) / 5
    assert found["best_of"] == 3
    assert found["best_of_kl"] == pytest.approx(math.log(3) - 2 / 3)

    # The policy's KL: log-probs of what the candidate has said, a sequence at a time, without padding.
    own = HFRollout(backbone, "policy", SamplingConfig(max_new_tokens=8)).generate(
        ids, derive_seed(0, "evaluate", "policy")
    )
    decoded = [backbone.tokenizer.decode(row, skip_special_tokens=True) for row in own.responses]
    assert decoded == [row["response"] for row in read_jsonl(Path("e/candidate.jsonl"))[1:]]
    kls = []
    for prompt, response in zip(own.prompts, own.responses, strict=True):
        logps = []
        for role in ("policy", "anchor"):
            with backbone.role(role), torch.no_grad():
                logits_TV = backbone(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logps.append(logits_TV.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum().item())
        kls.append(logps[0] - logps[1])
    assert found["kl"] == pytest.approx(sum(kls) / 5, abs=1e-4)
    assert abs(found["kl"]) > 0.01
    assert "Best of 3" in Path("e/report.html").read_text()


def test_an_interrupted_one_goes_on_to_the_same_file(cli: Callable[..., Outcome], run_dir: Path) -> None:
    first, path = evaluate(cli), Path("e/best_of.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    again = evaluate(cli)
    assert again.pop("asked") == first.pop("asked")
    assert again == pytest.approx(first, abs=1e-5)  # of batches that are cut elsewhere
    said = [json.loads(line).get("response") for line in whole.splitlines()]
    assert [row.get("response") for row in read_jsonl(path)] == said
    # Without it the win-rate is the same, and nothing is said of it; the result with it is not written over.
    plain = cli("evaluate", "run", *SETTINGS, "--out", "e")
    assert isinstance(plain.error, Failure)
    assert (plain.code, plain.error.kind, plain.error.key) == (2, "changed", "best_of")
    Path("e/summary.json").unlink()
    plain = cli("evaluate", "run", *SETTINGS, "--out", "e")
    assert plain.code == 0, plain
    line = json.loads(plain.out)
    assert line["win_rate"] == first["win_rate"]
    assert "best_of" not in line


def test_what_is_refused(cli: Callable[..., Outcome], run_dir: Path) -> None:
    def refused(*arguments: str) -> None:
        assert cli("evaluate", *arguments).code == 2
        app(["evaluate", *arguments], standalone_mode=False)

    with raises("conflict", key="policy.best_of"):
        refused("model", "--against", "model", *SETTINGS, "policy.best_of=3")
    with raises("invalid", key="policy.best_of"):
        refused("run", *SETTINGS, "policy.best_of=1")
    with raises("conflict", key="policy.best_of"):
        refused("run", "--suite", "mt_bench", "--judge", "length", "policy.best_of=3")
    shutil.rmtree(run_dir / "reward")
    with raises("missing", key="ppo.reward.adapter"):
        refused("run", *SETTINGS, "policy.best_of=3")
    assert not Path("evaluations").exists()
