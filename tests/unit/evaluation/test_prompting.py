"""The template travels: exports carry it, and two sides that are prompted differently are not compared unasked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pe_rlhf.config import Recipe
from pe_rlhf.config.evaluate import EvaluationSettings
from pe_rlhf.config.load import save_recipe
from pe_rlhf.evaluation.prompting import prompting_of
from pe_rlhf.evaluation.sources import LocalSource, find_policy, load_source
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.runs.export import export_role
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.saved_roles import save_role
from reward.errors import Failure
from tests.runs import Outcome, read_jsonl, write_jsonl
from tests.tiny import tiny_model

CHAT = "{% for m in messages %}w9 {{ m.content }} w8{% endfor %}"


@pytest.fixture
def models(tmp_path: Path, saved_model: Callable[[PreTrainedModel], Path]) -> Path:
    """`plain` and `chat`: the same model, with and without a template in its tokenizer; and prompts."""
    folder = saved_model(tiny_model("llama"))
    shutil.copytree(folder, tmp_path / "plain")
    shutil.copytree(folder, tmp_path / "chat")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "chat")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "w3 w4"}, {"prompt": "w5"}])
    return tmp_path


def command(candidate: str, baseline: str | None, *options: str) -> list[str]:
    against = [] if baseline is None else ["--against", baseline]
    common = ["--judge", "length", "--prompts", "prompts.jsonl", "sampling.max_new_tokens=3"]
    return ["evaluate", candidate, *against, *common, *options]


@pytest.mark.parametrize(("candidate", "baseline"), [("chat", "plain"), ("plain", "chat")])
def test_two_sides_that_are_prompted_differently(
    models: Path, fails: Callable[..., Failure], cli: Callable[..., Outcome], candidate: str, baseline: str
) -> None:
    failure = fails(*command(candidate, baseline))
    assert (failure.kind, failure.key) == ("conflict", "baseline_template")
    assert not (models / "evaluations").exists()
    assert cli(*command(candidate, baseline, "different_templates=true", "--out", "allowed")).code == 0
    same = ["candidate_template=none", "baseline_template=none"]
    assert cli(*command(candidate, baseline, *same, "--out", "same")).code == 0
    # The same weights, prompt and seed: whatever differs would be the template.
    answers = [
        [row["response"] for row in read_jsonl(models / "same" / f"{side}.jsonl")[1:]]
        for side in ("candidate", "baseline")
    ]
    assert answers[0] == answers[1]


def test_a_template_that_is_none(models: Path, fails: Callable[..., Failure]) -> None:
    failure = fails(*command("chat", "chat", "candidate_template=absent.jinja"))
    assert (failure.kind, failure.key) == ("missing", "candidate_template")


@pytest.mark.parametrize(
    ("base", "setting", "expected"),
    [("plain", CHAT, CHAT), ("chat", "auto", CHAT), ("chat", "none", None), ("plain", "auto", None)],
)
def test_an_exported_adapter_is_prompted_as_it_was_trained(
    models: Path, base: str, setting: str, expected: str | None, fails: Callable[..., Failure]
) -> None:
    backbone = load_backbone(models / base)
    backbone.add_adapter("policy", init="pissa", rank=2)
    ppo = {"prompts": "x", "reward": [{"function": "reward.scores:length"}]}
    tree: dict[str, Any] = {"model": str(models / base), "chat_template": setting, "ppo": ppo}
    run = RunFiles(models / "run")
    run.folder.mkdir()
    save_recipe(Recipe.model_validate(tree), run.recipe)
    save_role(backbone, "policy", run.role("policy").folder)
    for form in ("lora", "merged"):
        exported = export_role(run.folder, form, models / form)  # type: ignore[arg-type]
        assert AutoTokenizer.from_pretrained(exported).chat_template == expected
    if (expected is None) != (base == "plain"):
        failure = fails(*command("lora", None))  # against its base, which is prompted otherwise
        assert (failure.kind, failure.key) == ("conflict", "baseline_template")


def test_prompts_that_are_too_long_are_left_out_on_both_sides(
    models: Path, fails: Callable[..., Failure], cli: Callable[..., Outcome]
) -> None:
    """As a run's evaluate stage does it; a file with nothing but a head does not stand in the way."""
    limit = load_backbone(models / "plain").longest_sequence
    rows = [{"question": "w3"}, {"question": "w4 " * limit}, {"question": "w5"}]
    write_jsonl(models / "prompts.jsonl", rows)
    (models / "e").mkdir()
    (models / "e" / "candidate.jsonl").write_text('{"identity": "of an earlier try", "prompts": "0"}\n')
    outcome = cli(*command("plain", "plain", "prompts.columns.prompt=question", "--out", "e"))
    assert outcome.code == 0, outcome
    for side in ("candidate", "baseline"):
        assert [row["prompt"] for row in read_jsonl(models / "e" / f"{side}.jsonl")[1:]] == ["w3", "w5"]
    # With outputs of a file, those of the prompts that are left.
    outputs = [{"prompt": row["question"], "response": "r" * (1 + i)} for i, row in enumerate(rows)]
    write_jsonl(models / "outputs.jsonl", outputs)
    outcome = cli(*command("plain", "outputs.jsonl", "prompts.columns.prompt=question", "--out", "f"))
    assert json.loads(outcome.out)["mean_len_baseline"] == 2.0  # of 1 and 3 letters
    write_jsonl(models / "prompts.jsonl", rows[1:2])
    failure = fails(*command("plain", "plain", "prompts.columns.prompt=question", "--out", "g"))
    assert (failure.kind, failure.key) == ("too_long", "sampling.max_new_tokens")


def test_prompts_by_format(models: Path, cli: Callable[..., Outcome]) -> None:
    row = {"chosen": "\n\nHuman: w3\n\nAssistant: w4", "rejected": "\n\nHuman: w3\n\nAssistant: w5"}
    write_jsonl(models / "prompts.jsonl", [row])
    outcome = cli(*command("plain", "plain", "prompts.format=hh_rlhf", "--out", "e"))
    assert outcome.code == 0, outcome
    assert [line["prompt"] for line in read_jsonl(models / "e" / "candidate.jsonl")[1:]] == [
        [{"role": "user", "content": "w3"}]
    ]


def test_the_arguments_of_a_runs_template_are_its_recipes(models: Path, fails: Callable[..., Failure]) -> None:
    template = CHAT + "{% if loud %} w7{% endif %}"
    arguments = {"loud": True}
    ppo = {"prompts": "x", "reward": [{"function": "reward.scores:length"}]}
    tree: dict[str, Any] = {"model": str(models / "plain"), "chat_template": template, "ppo": ppo}
    run = RunFiles(models / "run")
    run.folder.mkdir()
    save_recipe(Recipe.model_validate({**tree, "chat_template_kwargs": arguments}), run.recipe)
    backbone = load_backbone(models / "plain")
    backbone.add_adapter("policy", rank=2)
    save_role(backbone, "policy", run.role("policy").folder)
    settings = EvaluationSettings.model_validate({"judge": "length"})
    prompting = prompting_of("candidate", str(run.folder), settings, find_policy(str(run.folder)), None)
    assert prompting.codec is not None
    assert prompting.codec.render("w3") == "w9 w3 w8 w7"
    source = load_source(str(run.folder), settings, prompting)
    assert isinstance(source, LocalSource)
    assert source.codec.render("w3") == "w9 w3 w8 w7"
    (models / "chat.jinja").write_text(template)
    failure = fails(*command("run", "plain", "baseline_template=chat.jinja"))
    assert (failure.kind, failure.key) == ("conflict", "baseline_template")


def test_prompts_that_a_template_refuses_are_bad_rows(
    models: Path, fails: Callable[..., Failure], cli: Callable[..., Outcome]
) -> None:
    """Gemma's takes no system turn: such rows are left out and said, and too many of them are an error."""
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
    (models / "refusing.jinja").write_text(refusing)
    options = [f"{side}_template=refusing.jinja" for side in ("candidate", "baseline")]
    odd = {"prompt": [{"role": "system", "content": "w6"}, {"role": "user", "content": "w7"}]}
    write_jsonl(models / "prompts.jsonl", [{"prompt": "w3 w4"}, odd, {"prompt": "w5"}])
    failure = fails(*command("plain", "chat", *options))
    assert (failure.key, failure.row) == ("--prompts", 2)
    done = cli(*command("plain", "chat", *options, "max_bad_share=0.5", "--out", "out"))
    assert done.code == 0, done
    assert "left out row 2" in done.err
    assert len(read_jsonl(models / "out" / "candidate.jsonl")) == 1 + 2
