"""What a reward model's own template refuses is a bad row before anything is sampled or scored, in every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.runs.saved_roles import save_role
from reward.errors import Failure
from tests.runs import Outcome, Tree, read_jsonl, write_jsonl
from tests.stage_support import byte_model, run

# It takes the question itself, and refuses the conversation with an answer: as templates do that want a system turn.
REFUSING = (
    "{% for m in messages %}{% if 'BAD' in m.content and messages | length > 1 %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
PROMPTS = ["BAD one", *(f"Prompt {i}:" for i in range(9))]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy model, a reward model `plain` without a template, and `refusing` and the chat model `chat`, whose
    templates refuse one prompt."""
    monkeypatch.chdir(tmp_path)
    model = byte_model(tmp_path / "model", pad_is_eos=True, initializer_range=0.3, eos_token_id=list(range(0, 258, 12)))
    reward = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name, template in (("plain", None), ("refusing", REFUSING)):
        tokenizer.chat_template = template
        reward.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    chat = byte_model(tmp_path / "chat", pad_is_eos=True, initializer_range=0.4, max_position_embeddings=2048)
    tokenizer.chat_template = REFUSING.replace(" and messages | length > 1", "")
    tokenizer.save_pretrained(chat)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    pairs = [{"prompt": prompt, "chosen": "yes", "rejected": "no"} for prompt in PROMPTS]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    return tmp_path


def test_evaluate_reward_looks_at_both_models_before_one_scores(models: Path, cli: Callable[..., Outcome]) -> None:
    command = ["evaluate-reward", "plain", "pairs.jsonl", "--second", "refusing", "--out", "e"]
    refused = cli(*command)
    assert isinstance(refused.error, Failure)
    assert (refused.code, refused.error.key, refused.error.row) == (2, "PAIRS", 1)
    assert "scoring with" not in refused.err
    found = cli(*command, "max_bad_share=0.1")
    assert found.code == 0, found
    assert json.loads(found.out)["n"] == json.loads(found.out)["second"]["n"] == 9


@pytest.mark.parametrize("by", ["judge", "best of"])
def test_evaluate_leaves_it_out_before_it_samples(models: Path, cli: Callable[..., Outcome], by: str) -> None:
    backbone = load_backbone(models / "model")
    backbone.add_adapter("policy", rank=2)
    save_role(backbone, "policy", models / "run" / "ppo" / "adapter")
    sources = [{"model": "refusing"}]
    tree: Tree = {"model": "model", "threads": 1, "ppo": {"prompts": "prompts.jsonl", "reward": sources}}
    (models / "run" / "recipe.yaml").write_text(json.dumps(tree))
    asked = {"judge": ["--judge", "reward_model:refusing"], "best of": ["--judge", "length", "policy.best_of=2"]}[by]
    command = ["evaluate", "run", "--prompts", "prompts.jsonl", *asked, "sampling.max_new_tokens=4", "--out", "e"]
    refused = cli(*command)
    assert isinstance(refused.error, Failure)
    assert (refused.code, refused.error.key, refused.error.row) == (2, "--prompts", 1)
    assert not (models / "e" / "candidate.jsonl").exists()
    found = cli(*command, "max_bad_share=0.1")
    assert found.code == 0, found
    assert (json.loads(found.out)["n"], json.loads(found.out)["invalid"]) == (9, 0)
    assert [row["prompt"] for row in read_jsonl(models / "e" / "candidate.jsonl")[1:]] == PROMPTS[1:]


CHAT: Tree = {"kind": "llm", "target": "chat", "min_label_mass": 0.0, "verdict": "probabilities"}
JUDGES: list[str | Tree] = [
    "reward_model:refusing",
    CHAT,
    # A jury of two has no verdict without either of them.
    {"kind": "jury", "members": ["length", "reward_model:refusing"]},
    {"kind": "jury", "target": "reward_model:refusing,reward_model:plain"},
    {"kind": "jury", "members": ["length", CHAT]},
    {"kind": "jury", "members": ["length", CHAT, "reward_model:refusing"]},
]


@pytest.mark.parametrize("judge", JUDGES)
def test_a_judge_of_a_stage(models: Path, judge: str | Tree) -> None:
    stage: Tree = {"prompts": "prompts.jsonl", "judge": judge, "sampling": {"max_new_tokens": 4}}
    tree: Tree = {"model": "model", "threads": 1, "preferences": {**stage, "max_bad_share": 0.1}}
    summary = run(tree, models / "run", "preferences")["preferences"]
    assert (summary["prompts"], summary["invalid"]) == (9, 0)
    (left_out,) = read_jsonl(models / "run" / "preferences" / "left_out_prompts.jsonl")
    assert left_out["row"] == 1


def test_a_jury_goes_on_without_the_one_of_three_that_cannot_read_a_prompt(models: Path) -> None:
    judge: Tree = {"kind": "jury", "members": ["length", "reward_model:refusing", "reward_model:plain"]}
    stage: Tree = {"prompts": "prompts.jsonl", "judge": judge, "sampling": {"max_new_tokens": 4}}
    summary = run({"model": "model", "threads": 1, "preferences": stage}, models / "run", "preferences")["preferences"]
    assert (summary["prompts"], summary["invalid"]) == (10, 0)
    votes = [row["votes"].values() for row in read_jsonl(models / "run" / "preferences" / "verdicts.jsonl")]
    assert sum(None in row for row in votes) == 1
