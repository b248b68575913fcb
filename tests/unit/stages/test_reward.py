"""The reward stage: that it learns, and that its numbers are those of single passes."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pe_rlhf.config import Recipe, RewardConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.preference_pairs import Pairs
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.runs.saved_roles import load_role
from pe_rlhf.stages import reward_members
from pe_rlhf.stages.add_roles import add_role
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.pipeline import run_recipe
from pe_rlhf.stages.reward_pairs import load_pairs
from tests.runs import Tree, read_jsonl, without_time, write_jsonl
from tests.stage_support import byte_model, run
from tests.tiny import perturb

PROMPTS = 30


def letters(random: torch.Generator, often: str) -> str:
    """A response of random length with many of one letter."""
    length = int(torch.randint(3, 12, (), generator=random))
    others = "bcdefghij "
    picks = torch.rand(length, generator=random)
    rest = torch.randint(len(others), (length,), generator=random)
    return " " + "".join(often if p < 0.6 else others[i] for p, i in zip(picks.tolist(), rest.tolist(), strict=True))


def learnable() -> list[Tree]:
    """Four pairs for each prompt; the chosen ones have many `a`, the rejected ones many `z`."""
    random = torch.Generator().manual_seed(0)
    return [
        {"prompt": f"Prompt {i}:", "chosen": letters(random, "a"), "rejected": letters(random, "z")}
        for i in range(PROMPTS)
        for _ in range(4)
    ]


def recipe(folder: Path, rows: list[Tree], **settings: Any) -> Tree:
    """A recipe on a byte model where padding and EOS are one id."""
    return {
        "model": str(byte_model(folder / "model", pad_is_eos=True, initializer_range=0.1)),
        "adapter": {"rank": 4, "alpha": 8},
        "threads": 1,
        "reward": {"data": str(write_jsonl(folder / "pairs.jsonl", rows)), **settings},
    }


def metrics(folder: Path) -> list[Tree]:
    return read_jsonl(folder / "run" / "reward" / "metrics.jsonl")


def pairs_of(tree: Tree, folder: Path) -> tuple[Pairs, Pairs, Backbone]:
    context: StageContext[RewardConfig] = StageContext(Recipe.model_validate(tree), folder / "run", "reward")
    backbone = load_backbone(tree["model"])
    train, held_out = load_pairs(context, context.config, backbone)
    return train, held_out, backbone


@torch.no_grad()
def score_alone(backbone: Backbone, pair: tuple[list[int], list[int]]) -> float:
    """The reward at the last token of one sequence that stands by itself."""
    prompt, response = pair
    with backbone.role("reward"):
        return backbone(torch.tensor([prompt + response])).logits.item()


def test_it_learns_and_its_summary_is_that_of_single_passes(tmp_path: Path) -> None:
    tree = recipe(tmp_path, learnable(), learning_rate=1e-2, batch_size=16, eval_share=0.2, epochs=2)
    summary = run(tree, tmp_path / "run")["reward"]
    assert summary["eval_accuracy"] > 0.9
    assert summary["eval_loss"] < 0.4

    # Again from the adapter on the disk, one sequence at a time, and with sums written out.
    train, held_out, backbone = pairs_of(tree, tmp_path)
    load_role(backbone, "reward", tmp_path / "run" / "reward" / "adapter")
    chosen = [score_alone(backbone, (pair.prompt, pair.chosen)) for pair in held_out.pairs]
    rejected = [score_alone(backbone, (pair.prompt, pair.rejected)) for pair in held_out.pairs]
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    assert summary["eval_pairs"] == len(margins) == 6 * 4
    assert summary["train_pairs"] == len(train) == 24 * 4
    assert summary["eval_margin"] == pytest.approx(sum(margins) / 24, abs=1e-3)
    assert summary["eval_loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 24, abs=1e-3)
    assert summary["eval_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 24)
    last = metrics(tmp_path)[-1]
    assert last["eval_loss"] == pytest.approx(summary["eval_loss"], abs=1e-5)
    assert last["eval_calibration_error"] == pytest.approx(summary["calibration_error"], abs=1e-5)
    tables = read_jsonl(tmp_path / "run" / "reward" / "reliability.jsonl")
    assert [table["step"] for table in tables] == [row["step"] for row in metrics(tmp_path) if "eval_loss" in row]
    assert all(sum(row["count"] for row in table["bins"]) == 24 for table in tables)
    assert tables[-1]["bins"] == summary["reliability"]

    scores = [score_alone(backbone, pair) for pair in train.responses().rows]
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-3)
    assert max(scores) - min(scores) > 1


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_margins_and_smoothing_by_hand(tmp_path: Path, smoothing: float) -> None:
    """A head starts at zero: the first loss is that of a difference of minus the margin, 0 where none is given."""
    margins = [0.5, 1.0, 2.0, None]
    rows = [{"prompt": f"{i}:", "chosen": " yes", "rejected": " no", "margin": m} for i, m in enumerate(margins)]
    held_out = str(write_jsonl(tmp_path / "held_out.jsonl", rows))
    settings = {"eval_data": held_out, "batch_size": 4, "label_smoothing": smoothing, "learning_rate": 1e-12}
    run(recipe(tmp_path, rows, **settings), tmp_path / "run")
    losses = [
        (1 - smoothing) * math.log1p(math.exp(m or 0)) + smoothing * math.log1p(math.exp(-(m or 0))) for m in margins
    ]
    (line,) = metrics(tmp_path)
    assert line["loss"] == pytest.approx(sum(losses) / 4, abs=1e-5)
    assert line["accuracy"] == 0.5
    assert line["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)  # the plain loss, whatever training adds to it


def test_micro_batches_change_rounding_only(tmp_path: Path) -> None:
    curves = []
    for tokens in (1, 100, 100_000):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        settings = {"learning_rate": 5e-3, "batch_size": 12, "micro_batch_tokens": tokens, "centering": 0.05}
        run(recipe(folder, learnable()[:60], **settings), folder / "run")
        curves.append([line["loss"] for line in metrics(folder)])
    assert len(curves[0]) == 5
    assert curves[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(curves[0][-1] - curves[0][0]) > 0.02
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)


def test_dropout_is_drawn_anew_in_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate of nothing the weights are the same in each step, and of equal pairs so is the batch, in whatever order
    an epoch takes them: only the dropout masks differ."""

    def add_trained_role(context: Any, backbone: Backbone, role: str, *rest: Any, **named: Any) -> None:
        add_role(context, backbone, role, *rest, **named)
        perturb(backbone, role, 0.2)

    monkeypatch.setattr(reward_members, "add_role", add_trained_role)
    norms = {}
    for dropout in (0.0, 0.5):
        folder = tmp_path / str(dropout)
        folder.mkdir()
        rows = learnable()[:1] * 16
        held_out = str(write_jsonl(folder / "held_out.jsonl", rows))
        tree = recipe(folder, rows, batch_size=16, epochs=3, learning_rate=1e-30, eval_data=held_out)
        tree["adapter"]["dropout"] = dropout
        run(tree, folder / "run")
        norms[dropout] = [line["grad_norm"] for line in metrics(folder)]
    assert norms[0.0] == pytest.approx([norms[0.0][0]] * 3, rel=1e-4)
    first, *others = norms[0.5]
    assert all(norm != pytest.approx(first, rel=1e-3) for norm in others)


def test_dropout_is_on_in_training_and_off_in_evaluations(tmp_path: Path) -> None:
    """Held-out scores are those of single passes without dropout, and training is not that of a run without."""
    losses = []
    for dropout in (0.0, 0.5):
        folder = tmp_path / str(dropout)
        folder.mkdir()
        tree = recipe(folder, learnable()[:48], learning_rate=1e-2, batch_size=12, eval_share=0.2, epochs=2)
        tree["adapter"]["dropout"] = dropout
        summary = run(tree, folder / "run")["reward"]
        losses.append(metrics(folder)[-1]["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    _, held_out, backbone = pairs_of(tree, folder)
    load_role(backbone, "reward", folder / "run" / "reward" / "adapter")
    rows = [score_alone(backbone, row) for row in held_out.responses().rows]
    margins = [chosen - rejected for chosen, rejected in zip(rows[: len(held_out)], rows[len(held_out) :], strict=True)]
    assert summary["eval_margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-3)


def test_checkpoints_are_ranked_by_the_held_out_loss(tmp_path: Path) -> None:
    """A checkpoint of weights that were not evaluated has no score, and not that of weights before."""
    settings = {"checkpoint_every": 1, "keep_checkpoints": 99, "eval_every": 2, "learning_rate": 1e-2}
    run(recipe(tmp_path, learnable()[:40], batch_size=8, eval_share=0.2, **settings), tmp_path / "run")
    lines = {line["step"]: line.get("eval_loss") for line in metrics(tmp_path)}
    paths = sorted((tmp_path / "run" / "reward").glob("checkpoints/*/state.json"))
    states = [json.loads(path.read_text()) for path in paths]
    assert [state["step"] for state in states] == list(lines)
    scores = [None if loss is None else -loss for loss in lines.values()]
    assert scores.count(None) == 2
    assert [state.get("score") for state in states] == pytest.approx(scores)


def test_the_schedule_ends_with_the_last_batch_which_may_be_short(tmp_path: Path) -> None:
    """30 pairs in batches of 8 are 4 steps, so two epochs 8: the rate falls by an eighth with each."""
    settings = {"max_pairs": 30, "batch_size": 8, "epochs": 2, "learning_rate": 8e-3}
    optimizer = {"schedule": "linear", "warmup_ratio": 0.0}
    summary = run(recipe(tmp_path, learnable()[:48], optimizer=optimizer, **settings), tmp_path / "run")["reward"]
    lines = metrics(tmp_path)
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * (8 - k) for k in range(8)])
    assert [line["epoch"] for line in lines] == [0] * 4 + [1] * 4
    assert summary["steps"] == 8
    mean = sum(line["seconds_step"] for line in lines) / 8
    assert summary["seconds_per_step"] == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("init", ["lora", "lora_ga"])
def test_a_step_that_is_repeated_has_the_same_numbers_which_are_there_once(tmp_path: Path, init: str) -> None:
    settings = {"checkpoint_every": 1, "eval_every": 1, "keep_checkpoints": 9, "learning_rate": 1e-2, "batch_size": 8}
    tree = recipe(tmp_path, learnable()[:32], **settings)
    tree["adapter"] |= {"dropout": 0.2, "init": init}
    run(tree, tmp_path / "run")
    folder = tmp_path / "run" / "reward"
    names = ("metrics.jsonl", "reliability.jsonl")
    before = [[*map(without_time, read_jsonl(folder / name))] for name in names]
    weights = load_file(folder / "adapter" / "role.safetensors")
    steps = [line["step"] for line in before[0]]
    assert len(steps) > 2
    (folder / "summary.json").unlink()  # as if it had been killed in the last step, after its lines
    shutil.rmtree(folder / "checkpoints" / f"step-{steps[-1]:06}")
    run_recipe(Recipe.model_validate(tree), tmp_path / "run", ["reward"], "resume")
    assert [[*map(without_time, read_jsonl(folder / name))] for name in names] == before
    assert [line["step"] for line in before[1]] == steps
    again = load_file(folder / "adapter" / "role.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


@pytest.mark.shared
@pytest.mark.parametrize("model", ["stories260K", "tinychat3m"])
def test_real_transcripts(tmp_path: Path, shared_data: Path, model: str) -> None:
    """hh-rlhf as it is published: its text is what the model reads, and two steps train."""
    source = {"path": str(shared_data / "hh_rlhf" / "helpful-base.jsonl.gz"), "split": "train[:6]"}
    settings = {"data": source, "batch_size": 2, "eval_share": 0.3, "max_length": 160}
    name = str(shared_data / model / "hf")
    tree = {"model": name, "adapter": {"rank": 2, "alpha": 4}, "threads": 1, "reward": settings}
    summary = run(tree, tmp_path / "run")["reward"]
    assert (summary["train_pairs"], summary["eval_pairs"]) == (4, 2)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in metrics(tmp_path))

    with gzip.open(source["path"], "rt") as file:
        transcript = json.loads(next(file))["chosen"]
    tokenizer = AutoTokenizer.from_pretrained(name)
    prompt, response = transcript.rsplit("\n\nAssistant:", 1)
    messages = [{"role": "user", "content": prompt.removeprefix("\n\nHuman: ")}]
    prompt_ids, response_ids = TextCodec(tokenizer).encode_pair(messages, response.removeprefix(" "))
    text = tokenizer.decode(prompt_ids + response_ids)
    assert transcript in text
    assert response_ids[-1] == tokenizer.eos_token_id
