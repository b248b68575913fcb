"""The sft stage: its losses against a plain model's, its weights against W0 + s·B·A, and who starts from them."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pe_rlhf.config import Recipe
from pe_rlhf.config.load import load_recipe, save_recipe
from pe_rlhf.evaluation.sources import find_policy
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.report.run_page import write_report
from pe_rlhf.runs.saved_roles import find_role
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.outcome_table import outcome_table
from pe_rlhf.stages.pipeline import RUN
from reward.errors import InputError
from tests.paths import ROOT
from tests.runs import Outcome, Tree, read_jsonl, recipe, write_jsonl, write_recipe
from tests.stage_support import byte_model
from tests.tiny import FAMILIES, tiny_model
from tests.unit.report.parsed import parse, plots, section, table

Cli = Callable[..., Outcome]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PAIRS = [{"prompt": f"Say {'so ' * (i % 5)}{i}:", "completion": f" {i}" * (1 + i % 4)} for i in range(12)]
CHATS = [
    {"messages": [{"role": "user", "content": f"u{i}"}, {"role": "assistant", "content": f"a{i}" * (1 + i % 3)}]}
    for i in range(12)
]
ADAPTER: Tree = {"rank": 2, "alpha": 6, "scaling": "rslora"}
TEXTS = [{"text": f"Line {i} " * (1 + i % 3)} for i in range(12)]


def sft(model: Path | str, folder: Path, rows: list[Tree], **changes: Any) -> Tree:
    """A recipe with the sft stage alone, of those rows; the last two are held out."""
    section: Tree = {
        "data": str(write_jsonl(folder / "train.jsonl", rows[:-2])),
        "eval_data": str(write_jsonl(folder / "held_out.jsonl", rows[-2:])),
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
    }
    return {"model": str(model), "seed": 3, "adapter": ADAPTER, "sft": section | changes}


def train(tree: Tree, run_dir: Path) -> Tree:
    """Run the stages of a recipe without a report, which takes longer than they do. Returns the summary of sft."""
    loaded = Recipe.model_validate(tree)
    for name in loaded.stages:
        context = StageContext(loaded, run_dir, name)
        context.folder.mkdir(parents=True)
        for folder in (run_dir, context.folder):
            save_recipe(loaded, folder / "recipe.yaml")
        with context.resources:
            RUN[name](context)
    return json.loads((run_dir / "sft" / "summary.json").read_text())


def metrics(run_dir: Path) -> list[Tree]:
    return read_jsonl(run_dir / "sft" / "metrics.jsonl")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return byte_model(tmp_path / "byte-model", pad_is_eos=True, initializer_range=0.1)


# ---- losses ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_loss(model: Path, rows: list[tuple[str, str]], whole: bool) -> float:
    """Nats per token of the second texts (and of the first, where `whole`), each row alone, with EOS at its end."""
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


def test_what_is_too_long_is_cut(model: Path, tmp_path: Path) -> None:
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


# ---- what it leaves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "float32") for family in sorted(FAMILIES)), ("llama", "bfloat16")]
)
def test_the_merged_model_is_the_base_and_its_adapter(
    tmp_path: Path, family: str, dtype: str, saved_model: Callable[[PreTrainedModel], Path]
) -> None:
    base = saved_model(tiny_model(family))
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(5, 15)]
    adapter = {"rank": 3, "alpha": 5, "scaling": "rslora", "targets": "attention", "dropout": 0.1, "init": "pissa"}
    tree = sft(base, tmp_path, rows) | {"adapter": adapter, "backbone": {"dtype": dtype}}
    train(tree, tmp_path / "run")

    folder = tmp_path / "run" / "sft"
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (3, str(base))
    assert config["lora_alpha"] / 3 == pytest.approx(5 / math.sqrt(3))
    before = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")  # in the dtype that its config names
    after = loaded.state_dict()
    assert before.keys() == after.keys()
    changed = 0
    for name, weight in after.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected = before[name]
        if (A_RI := factors.get(f"{prefix}.lora_A.weight")) is not None:
            delta_OI = 5 / math.sqrt(3) * factors[f"{prefix}.lora_B.weight"] @ A_RI
            delta = delta_OI.T if family == "gpt2" else delta_OI  # GPT-2 keeps its weights the other way round
            expected = (before[name].float() + delta).to(weight.dtype)
            changed += int(not torch.equal(weight, before[name]))
        assert weight.dtype == getattr(torch, dtype)
        torch.testing.assert_close(weight, expected, rtol=1e-6 if dtype == "float32" else 1e-2, atol=1e-7)
    assert changed == len(factors) // 2 > 0

    if dtype == "float32":
        ids_BT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
        torch.testing.assert_close(loaded(ids_BT).logits, peft(input_ids=ids_BT).logits, atol=1e-5, rtol=1e-5)


def test_the_model_is_complete_and_nothing_of_the_trainer_is_in_it(
    tmp_path: Path, saved_model: Callable[[PreTrainedModel], Path], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    base = saved_model(tiny_model("llama", use_cache=True))
    train(sft(base, tmp_path, [{"text": f"w{i} w{i + 1}"} for i in range(9)]), tmp_path / "run")
    made = tmp_path / "run/sft/model"
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        old, new = (json.loads((folder / name).read_text()) for folder in (base, made))
        assert new.pop("transformers_version", None) == old.pop("transformers_version", None)
        assert new | old == new, name
        assert not new.keys() - old.keys() - {"is_local", "local_files_only"}, name
    assert (made / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "run/sft").iterdir()) == [
        *("adapter", "checkpoints", "metrics.jsonl", "model", "recipe.yaml", "summary.json")
    ]


def test_the_hub_is_sent_no_telemetry(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(*_: object, **__: object) -> None:
        raise AssertionError("telemetry was sent")

    for name in ("CI", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.utils._telemetry._start_telemetry_thread", sent)
    train(sft(model, tmp_path, TEXTS), tmp_path / "run")


def test_lora_plus_gives_b_a_rate_of_its_own(model: Path, tmp_path: Path) -> None:
    """One step of Adam without decay moves each entry with a gradient by the learning rate."""
    moved = {}
    for ratio in (1, 8):
        optimizer = {"warmup_ratio": 0, "lora_plus_ratio": ratio}
        train(sft(model, tmp_path, PAIRS, batch_size=10, optimizer=optimizer), tmp_path / f"ratio-{ratio}")
        factors = load_file(tmp_path / f"ratio-{ratio}/sft/adapter/adapter_model.safetensors")
        moved[ratio] = max(float(B_OR.abs().max()) for name, B_OR in factors.items() if "lora_B" in name)
    assert moved[1] == pytest.approx(1e-2, rel=1e-3)
    assert moved[8] == pytest.approx(8e-2, rel=1e-3)


def test_the_chat_template_it_was_trained_with_is_kept(model: Path, tmp_path: Path) -> None:
    train(sft(model, tmp_path, CHATS) | {"chat_template": TEMPLATE}, tmp_path / "run")
    assert AutoTokenizer.from_pretrained(tmp_path / "run/sft/model").chat_template == TEMPLATE
    assert AutoTokenizer.from_pretrained(model).chat_template is None


# ---- later stages ----------------------------------------------------------------------------------------------------


def test_all_later_stages_start_from_the_merged_model(cli: Cli, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    changes: Tree = {
        "sft": {"data": str(rows), "batch_size": 4, "learning_rate": 0.05, "epochs": 2, "eval_share": 0.1},
        "adapter__init": "pissa",
        "preferences__sampling__max_new_tokens": 12,
        "preferences__pairs_per_prompt": 3,
        "ppo__learning_rate": 0.05,
        "ppo__reward": [{"adapter": "stage"}],
    }
    path = write_recipe(tmp_path, recipe("preferences", "reward", "ppo", "evaluate", **changes))
    loaded = load_recipe(path, ["reward.data=null", "reward.eval_share=0.3"])
    train(loaded.model_dump(mode="json"), tmp_path / "run")

    # A run that is moved is whole: nothing in it says where it was but as a hint.
    moved = tmp_path / "elsewhere"
    (tmp_path / "run").rename(moved)
    ids_BT = torch.tensor([[5, 6, 7, 8, 9], [20, 21, 22, 23, 24]])
    anchor = AutoModelForCausalLM.from_pretrained(moved / "sft/model")
    original = load_backbone("random:tiny-llama")
    backbone = StageContext(load_recipe(moved / "recipe.yaml"), moved, "ppo").backbone()
    assert backbone.base_fingerprint() != original.base_fingerprint()
    for stage, role in (("reward", "reward"), ("ppo", "policy")):
        recorded = json.loads((moved / stage / "adapter/role.json").read_text())
        assert recorded["base_sha256"] == backbone.base_fingerprint()
        assert find_role(moved, role).base == str(moved / "sft/model")
    policy = find_policy(str(moved))
    assert policy is not None
    assert policy.base == str(moved / "sft/model")
    with torch.no_grad():
        expected = anchor(ids_BT).logits
        torch.testing.assert_close(backbone(ids_BT).logits, expected, atol=0, rtol=0)
        assert (expected - original(ids_BT).logits).abs().max() > 1e-2

    # Exports are for the merged model, too.
    assert cli("export", moved, "--format", "lora").code == 0
    assert cli("export", moved, "--format", "merged", "--checkpoint", "newest").code == 0
    lora, merged = moved / "export/policy-lora", moved / "export/policy-step-2-merged"
    assert json.loads((lora / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved / "sft/model")
    assert f'base_model: "{moved / "sft/model"}"' in (lora / "README.md").read_text()
    with torch.no_grad():
        policy = PeftModel.from_pretrained(anchor, lora)(input_ids=ids_BT).logits
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(merged)(ids_BT).logits, policy, atol=2e-5, rtol=1e-4
        )
        assert (policy - expected).abs().max() > 1e-3

    # …and without it there is nothing to start from.
    shutil.rmtree(moved / "sft")
    with pytest.raises(InputError, match="sft"):
        StageContext(load_recipe(moved / "recipe.yaml"), moved, "ppo").backbone()


def test_the_report_and_the_table_tell_of_it(model: Path, tmp_path: Path) -> None:
    summary = train(sft(model, tmp_path, PAIRS, eval_every=1), tmp_path / "run")
    page = parse(write_report(tmp_path / "run"))
    assert list(plots(section(page, "Supervised fine-tuning"))) == ["Loss"]
    done = table(section(page, "Stages"))["sft"]["What it did"]
    assert re.findall(r"\d+ (?:steps|rows|held)", done) == ["3 steps", "10 rows", "2 held"]
    console = Console(file=io.StringIO(), width=100)
    console.print(outcome_table("x", {"sft": summary}))
    line = next(line for line in console.file.getvalue().splitlines() if "sft" in line)  # type: ignore[attr-defined]
    before, after = (f"{summary[key]:.3f}" for key in ("eval_loss_before", "eval_loss"))
    assert [cell.strip() for cell in line.split("│")[2:5]] == [before, after, "2 rows"]


# ---- settings --------------------------------------------------------------------------------------------------------


def test_the_init_of_other_stages_is_not_that_of_sft(tmp_path: Path) -> None:
    tree = recipe("reward", adapter__init="lora_ga", adapter__init_options={"gamma": 4}, sft={"data": "x.jsonl"})
    loaded = load_recipe(write_recipe(tmp_path, tree), ["sft.adapter.rank=5"])
    own = loaded.adapter_for("sft")
    assert (own.init, own.init_options, own.rank, own.alpha) == ("lora", {}, 5, 4)
    assert loaded.adapter_for("reward").init == "lora_ga"
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


def test_weights_that_diverge(refused: Callable[..., str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    section: Tree = {"data": "rows.jsonl", "batch_size": 4, "learning_rate": 1e30, "optimizer": {"warmup_ratio": 0}}
    refused("run", write_recipe(tmp_path, recipe(sft=section)), "--run-dir", "out", code=3)
    failure = json.loads((tmp_path / "out" / "failure.json").read_text())
    assert (failure["kind"], failure["step"]) == ("not_finite", 2)
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1]


def test_a_recipe_of_sft_alone_is_one() -> None:
    assert Recipe.model_validate({"model": "m", "sft": {"data": "d"}}).stages == ["sft"]
