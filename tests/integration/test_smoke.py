"""`pe-rlhf run smoke`, whole: every file that a run promises, and that a run can be had again to the last bit."""

import datetime as dt
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pe_rlhf.config.load import bundled, load_recipe
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.model.names import resolve_model
from pe_rlhf.runs.saved_roles import load_role
from tests.paths import ROOT
from tests.runs import Outcome, read_jsonl, without_time

Cli = Callable[..., Outcome]
STAGES = ("preferences", "reward", "ppo", "evaluate")
ADAPTERS = ("reward/adapter", "ppo/adapter", "ppo/value")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> Path:
    """The directory of a run that the real command made, where it puts runs unasked."""
    folder = tmp_path_factory.mktemp("smoke")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PE_RLHF_CACHE": str(model_cache),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    command = [sys.executable, "-m", "pe_rlhf", "run", "smoke", "threads=1"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / "smoke"
    (run / "said.txt").write_text(done.stderr + done.stdout)
    return run


def equal_runs(a: Path, b: Path) -> None:
    for stage in STAGES:
        rows_a, rows_b = (list(map(without_time, read_jsonl(run / stage / "metrics.jsonl"))) for run in (a, b))
        assert rows_a == rows_b
        assert rows_a
        summaries = (json.loads((run / stage / "summary.json").read_text()) for run in (a, b))
        assert without_time(next(summaries)) == without_time(next(summaries))
    for file in ("preferences/preferences.jsonl", "ppo/samples.jsonl", "evaluate/samples.jsonl"):
        assert (a / file).read_bytes() == (b / file).read_bytes()
    for adapter in ADAPTERS:
        tensors_a, tensors_b = (load_file(run / adapter / "adapter_model.safetensors") for run in (a, b))
        assert tensors_a.keys() == tensors_b.keys()
        assert all(torch.equal(tensor, tensors_b[name]) for name, tensor in tensors_a.items())


def test_every_stage_leaves_its_files(smoke: Path) -> None:
    files = [f"{stage}/{name}" for stage in STAGES for name in ("recipe.yaml", "metrics.jsonl", "summary.json")]
    files += ["recipe.yaml", "report.html", "preferences/preferences.jsonl"]
    files += ["ppo/samples.jsonl", "evaluate/samples.jsonl", "evaluate/samples.md"]
    files += [
        f"{folder}/{name}" for folder in ADAPTERS for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    assert [name for name in files if not (smoke / name).is_file()] == []
    assert not [path for path in smoke.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("preferences", "pairs prompts pairs_dropped seconds peak_rss_mib"),
        (
            "reward",
            "eval_accuracy eval_accuracy_low eval_accuracy_high eval_pairs train_pairs seconds peak_rss_mib"
            " trainable_parameters calibration_error",
        ),
        (
            "ppo",
            "steps episodes reward_first reward_last kl_last seconds_per_step tokens_per_second peak_rss_mib"
            " trainable_parameters seconds",
        ),
        (
            "evaluate",
            "win_rate ci_low ci_high n ties kl mean_length_policy mean_length_anchor gold_policy gold_anchor"
            " reward_policy reward_anchor seconds peak_rss_mib",
        ),
    ],
)
def test_summaries_hold_what_they_promise(smoke: Path, stage: str, keys: str) -> None:
    summary = json.loads((smoke / stage / "summary.json").read_text())
    assert [key for key in keys.split() if not math.isfinite(summary.get(key, math.nan))] == []


def test_the_numbers_fit_each_other(smoke: Path) -> None:
    preferences, reward, ppo, final = (json.loads((smoke / stage / "summary.json").read_text()) for stage in STAGES)
    pairs = read_jsonl(smoke / "preferences/preferences.jsonl")
    assert preferences["pairs"] == len(pairs) == reward["train_pairs"] + reward["eval_pairs"]
    assert preferences["pairs"] + preferences["pairs_dropped"] == preferences["prompts"] == 32
    assert all(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs)  # its judge counts characters

    steps = read_jsonl(smoke / "ppo/metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3, 4] == list(range(1, ppo["steps"] + 1))
    assert [row["episodes"] for row in steps] == [16, 32, 48, 64]
    assert ppo["episodes"] == 64
    assert (ppo["reward_first"], ppo["reward_last"], ppo["kl_last"]) == (
        *(steps[0]["reward"], steps[-1]["reward"]),
        steps[-1]["kl"],
    )
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)  # the policy starts as the anchor
    seconds = sum(row[key] for row in steps for key in ("seconds_rollout", "seconds_score", "seconds_update"))
    assert ppo["seconds_per_step"] == pytest.approx(seconds / 4, abs=1e-3)
    assert ppo["tokens_per_second"] == pytest.approx(sum(row["tokens"] for row in steps) / seconds, rel=1e-3)

    rows = read_jsonl(smoke / "evaluate/samples.jsonl")
    wins = sum(len(row["response_policy"]) > len(row["response_anchor"]) for row in rows)
    ties = sum(len(row["response_policy"]) == len(row["response_anchor"]) for row in rows)
    assert (final["n"], final["wins"], final["ties"]) == (len(rows), wins, ties) == (32, wins, ties)
    assert final["win_rate"] == pytest.approx((wins + ties / 2) / 32)
    assert final["ci_low"] < final["win_rate"] < final["ci_high"]
    assert 0 < final["mean_length_policy"] <= 16


def test_the_run_ends_with_a_table_and_a_report(smoke: Path) -> None:
    said = (smoke / "said.txt").read_text()
    for row in ("reward model, held-out", "KL while training", "win-rate against the anchor", "peak memory (MiB)"):
        assert row in said
    assert said.splitlines()[-1] == f"report: {smoke / 'report.html'}"
    report = (smoke / "report.html").read_text()
    assert "smoke" in report
    assert report.rstrip().endswith("</html>")


def test_recipes_of_a_run_are_recipes(smoke: Path) -> None:
    day = load_recipe(smoke / "recipe.yaml").date  # the run's first, for what chat templates print
    assert day is not None
    assert abs((dt.date.today() - dt.date.fromisoformat(str(day))).days) <= 1
    expected = load_recipe(bundled("recipes") / "smoke.yaml", ["threads=1", f"date={day}"])
    for folder in (smoke, *(smoke / stage for stage in STAGES)):
        assert load_recipe(folder / "recipe.yaml") == expected


def test_adapters_load_in_plain_peft(smoke: Path, model_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PE_RLHF_CACHE", str(model_cache))
    ids_BT = torch.tensor([[5, 6, 7, 8, 200], [90, 41, 0, 17, 3]])
    backbone = load_backbone("random:tiny-llama")
    load_role(backbone, "policy", smoke / "ppo" / "adapter")
    base = AutoModelForCausalLM.from_pretrained(resolve_model("random:tiny-llama"))
    with torch.no_grad(), backbone.role("policy"):
        anchor_BTV = base(ids_BT).logits
        expected_BTV = PeftModel.from_pretrained(base, str(smoke / "ppo" / "adapter"))(ids_BT).logits
        torch.testing.assert_close(backbone(ids_BT).logits, expected_BTV, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(expected_BTV, anchor_BTV, atol=1e-4)  # it was trained


def test_the_same_seed_gives_the_same_run(smoke: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("run", "smoke", "threads=1", "--run-dir", "again").code == 0
    equal_runs(smoke, tmp_path / "again")


def test_in_two_parts_or_in_one(smoke: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("run", "smoke", "threads=1", "--run-dir", "parts", "--to", "reward").code == 0
    assert not (tmp_path / "parts/ppo").exists()
    assert cli("run", "smoke", "threads=1", "--run-dir", "parts", "--from", "ppo").code == 0
    equal_runs(smoke, tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("*.old-*"))


def test_another_seed_gives_another_run(smoke: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("run", "smoke", "threads=1", "seed=1", "--run-dir", "other", "--to", "preferences").code == 0
    file = "preferences/preferences.jsonl"
    assert (tmp_path / "other" / file).read_bytes() != (smoke / file).read_bytes()
