"""The sft stage: its losses against a plain model's, and its settings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from pe_rlhf.config import LoRAConfig, Recipe
from pe_rlhf.config.load import load_recipe, save_recipe
from tests.paths import ROOT
from tests.runs import Tree, read_jsonl, recipe, write_jsonl, write_recipe
from tests.unit.stages.sft_runs import CHATS, PAIRS, TEMPLATE, TEXTS, Cli, metrics, sft, train

# ---- losses ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_loss(model: Path, rows: list[tuple[str, str]], whole: bool) -> float:
    """Nats per token of the second texts (and of the first, where `whole`), each row by itself, with EOS at its end."""
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    total, count = 0.0, 0
    for given, learnt in rows:
        ids = tokenizer(given)["input_ids"] + tokenizer(learnt)["input_ids"] + [tokenizer.eos_token_id]
        logits_TV = plain(torch.tensor([ids])).logits[0, :-1]
        first = 1 if whole or not given else len(tokenizer(given)["input_ids"])
        losses = F.cross_entropy(logits_TV, torch.tensor(ids[1:]), reduction="none")[first - 1 :]
        total, count = total + losses.sum().item(), count + len(losses)
    return total / count


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize(
    ("rows", "texts"),
    [
        (PAIRS, [(row["prompt"], row["completion"]) for row in PAIRS]),
        (CHATS, [(f"[user]u{i}\n[assistant]", f"a{i}" * (1 + i % 3)) for i in range(12)]),
        (TEXTS, [("", row["text"]) for row in TEXTS]),
    ],
    ids=["pairs", "chats", "texts"],
)
def test_the_loss_of_the_first_step_is_that_of_a_plain_model(
    model: Path, tmp_path: Path, rows: list[Tree], texts: list[tuple[str, str]], completion_only: bool
) -> None:
    changes: Tree = {"batch_size": 12, "micro_batch_size": 3, "optimizer": {"warmup_ratio": 0}}
    tree = sft(model, tmp_path, rows, completion_only=completion_only, **changes)
    summary = train(tree | ({"chat_template": TEMPLATE} if rows is CHATS else {}), tmp_path / "run")
    line, held_out = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(plain_loss(model, texts[:-2], not completion_only), rel=1e-5)
    assert summary["eval_loss_before"] == pytest.approx(plain_loss(model, texts[-2:], not completion_only), rel=1e-5)
    # After it is that of the merged model.
    after = plain_loss(tmp_path / "run/sft/model", texts[-2:], not completion_only)
    assert summary["eval_loss"] == pytest.approx(held_out["eval_loss"]) == pytest.approx(after, rel=1e-5)
    assert abs(after - summary["eval_loss_before"]) > 1e-3
    assert (summary["train_rows"], summary["eval_rows"], summary["steps"]) == (10, 2, 1)


def test_rates_and_passes(model: Path, tmp_path: Path) -> None:
    optimizer = {"warmup_ratio": 0.25}
    summary = train(sft(model, tmp_path, PAIRS, epochs=3, eval_every=4, optimizer=optimizer), tmp_path / "run")
    steps = [line for line in metrics(tmp_path / "run") if "loss" in line]
    # 10 rows in batches of 4: three steps a pass. Three steps up from 0, then down by a sixth each.
    rates = [0, 1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [line["lr"] for line in steps] == pytest.approx([1e-2 * rate for rate in rates])
    assert [line["step"] for line in steps] == list(range(1, 10))
    held_out = [line for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert [line["step"] for line in held_out] == [4, 8, 9]
    assert (summary["steps"], summary["eval_loss"]) == (9, pytest.approx(held_out[-1]["eval_loss"]))


def test_training_lowers_the_held_out_loss_on_real_text(model: Path, tmp_path: Path) -> None:
    paragraphs = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8").split("\n\n")
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in paragraphs])
    section = {"data": str(data), "max_length": 96, "epochs": 6, "learning_rate": 3e-2, "eval_share": 0.2}
    tree = {"model": str(model), "adapter": {"rank": 8}, "sft": section | {"batch_size": 8, "micro_batch_size": 8}}
    summary = train(tree, tmp_path / "run")
    assert summary["train_rows"] + summary["eval_rows"] == len(paragraphs)
    assert summary["eval_loss_before"] > math.log(200)  # random over bytes
    assert summary["eval_loss"] < 0.92 * summary["eval_loss_before"]


def test_what_is_too_long_is_cut(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "0123456789", "completion": "abcd"}, {"prompt": "01", "completion": "abcdefghijkl"}]
    train(sft(model, tmp_path, rows * 2, max_length=8, batch_size=2), tmp_path / "run")
    # The prompt loses its start, so that the response has its EOS; then the response loses its end, and its EOS.
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    losses: list[float] = []
    for given, learnt, end in (("789", "abcd", [0]), ("1", "abcdefg", [])):
        ids = tokenizer(given + learnt)["input_ids"] + end
        logits_TV = plain(torch.tensor([ids])).logits[0, len(given) - 1 : -1]
        losses += F.cross_entropy(logits_TV, torch.tensor(ids[len(given) :]), reduction="none").tolist()
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    said = [line for line in capsys.readouterr().err.splitlines() if ": cut to" in line]
    assert [re.findall(r"\d+", line) for line in said] == [["8", "2", "2", "1"]] * 2  # training and held-out rows


# ---- settings --------------------------------------------------------------------------------------------------------


def test_the_init_of_other_stages_is_not_that_of_sft(tmp_path: Path) -> None:
    tree = recipe("reward", adapter__init="lora_ga", adapter__init_options={"gamma": 4}, sft={"data": "x.jsonl"})
    loaded = load_recipe(write_recipe(tmp_path, tree), ["sft.adapter.rank=5"])
    own, of_reward = loaded.adapter_for("sft"), loaded.adapter_for("reward")
    assert isinstance(own, LoRAConfig)
    assert isinstance(of_reward, LoRAConfig)
    assert (own.init, own.init_options, own.rank, own.alpha) == ("lora", {}, 5, 4)
    assert of_reward.init == "lora_ga"
    assert loaded.stages == ["sft", "reward"]
    save_recipe(loaded, tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == loaded


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.adapter.init=pissa", "sft trains a plain LoRA"),
        ("sft.micro_batch_size=3", "micro_batch_size"),
        ("sft.data=none.jsonl", "none.jsonl"),
        ("sft.data=one.jsonl", "too few to hold out"),
    ],
)
def test_mistakes(refused: Callable[..., str], tmp_path: Path, override: str, message: str) -> None:
    for name, rows in (("rows", PAIRS), ("one", PAIRS[:1])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    path = write_recipe(tmp_path, recipe(sft={"data": "rows.jsonl"}))
    assert message in refused("run", path, override, "--run-dir", "out")


def test_bad_rows_are_told_and_left_out(cli: Cli, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [*PAIRS, {"prompt": "p", "completion": " "}])
    path = write_recipe(tmp_path, recipe(sft={"data": "rows.jsonl", "max_bad_share": 0.1}))
    done = cli("run", path, "--run-dir", "out")
    assert done.code == 0
    assert "sft.data: left out row 13: the response is empty" in done.err
    summary = json.loads((tmp_path / "out/sft/summary.json").read_text())
    assert (summary["train_rows"], summary["eval_rows"]) == (11, 1)


def test_a_row_that_the_template_refuses_is_left_out(model: Path, tmp_path: Path) -> None:
    strict = "{% for m in messages %}{% if loop.previtem and loop.previtem.role == m.role %}"
    strict += "{{ raise_exception('twice the same role') }}{% endif %}{% endfor %}"
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    rows = [*CHATS[:5], {"messages": twice}, *CHATS[5:]]
    tree = sft(model, tmp_path, rows, max_bad_share=0.1) | {"chat_template": strict + TEMPLATE}
    assert train(tree, tmp_path / "run")["train_rows"] == 10
    (left_out,) = read_jsonl(tmp_path / "run" / "sft" / "left_out_data.jsonl")
    assert (left_out["row"], left_out["kind"]) == (6, "user_code")


def test_weights_that_diverge(refused: Callable[..., str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    section: Tree = {"data": "rows.jsonl", "batch_size": 4, "learning_rate": 1e30, "optimizer": {"warmup_ratio": 0}}
    refused("run", write_recipe(tmp_path, recipe(sft=section)), "--run-dir", "out", code=3)
    failure = json.loads((tmp_path / "out" / "failure.json").read_text())
    assert (failure["kind"], failure["step"]) == ("not_finite", 2)
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1]


def test_a_recipe_of_sft_alone_is_one() -> None:
    assert Recipe.model_validate({"model": "m", "sft": {"data": "d"}}).stages == ["sft"]
