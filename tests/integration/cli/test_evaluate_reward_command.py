"""`pe-rlhf evaluate-reward`: reward models on pairs and on responses that were cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pe_rlhf.runs.saved_roles import find_role
from pe_rlhf.scoring.reward_judge import reward_scores
from reward.errors import Failure
from tests.runs import PAIRS, Outcome, recipe, write_jsonl, write_recipe


def test_reward_models_on_pairs(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("reward", reward__epochs=6, reward__learning_rate=0.02))
    assert cli("run", path, "--run-dir", "run").code == 0
    pairs = [pair | {"subset": "even" if i % 2 == 0 else "odd"} for i, pair in enumerate(PAIRS)]
    write_jsonl(tmp_path / "subset_pairs.jsonl", pairs)
    outcome = cli("evaluate-reward", "run", "subset_pairs.jsonl", "--second", "run/reward", "--out", "e")
    assert outcome.code == 0, outcome
    line = json.loads(outcome.out, parse_constant=pytest.fail)  # NaN is no JSON
    assert line["n"] == 8
    assert {name: subset["n"] for name, subset in line["subsets"].items()} == {"even": 4, "odd": 4}
    assert line["agreement"] == 1.0  # with itself
    assert line["ci_low"] <= line["accuracy"] <= line["ci_high"]
    assert line["length"]["longer_is_better"] + line["length"]["shorter_is_better"] == 8 - sum(
        len(p["chosen"]) == len(p["rejected"]) for p in PAIRS
    )
    page = (tmp_path / "e" / "report.html").read_text()
    assert "Reliability" in page
    assert "Agreement with the second model" in page
    # The same question may be asked again; another one leaves the answer as it is.
    for other, key in (
        (("--limit", "4"), "content"),
        (("--second", "run"), "second"),
        (("--dtype", "bfloat16"), "dtype"),
    ):
        again = cli("evaluate-reward", "run", "subset_pairs.jsonl", "--second", "run/reward", "--out", "e", *other)
        assert isinstance(again.error, Failure)
        assert (again.code, again.error.kind, again.error.key) == (2, "changed", key)
    assert (tmp_path / "e" / "report.html").read_text() == page
    assert json.loads((tmp_path / "e" / "summary.json").read_text())["n"] == 8
    same = cli("evaluate-reward", "run", "subset_pairs.jsonl", "--second", "run/reward", "--out", "e")
    assert json.loads(same.out) == line
    judged = cli("evaluate", "run", *["--judge", "length"])
    assert judged.code == 2  # a run without a ppo stage has no policy
    asked = ["--against", "random:tiny-llama", "--prompts", "prompts.jsonl", "--judge", "length"]
    reward = cli("evaluate", "run/reward", *asked)
    assert reward.errors[0].endswith("run/reward holds no policy; it holds reward")


def test_pairs_are_a_data_source_and_what_the_template_refuses_is_a_bad_row(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Of ten rows in another's columns and hh-rlhf's transcripts, the model's template refuses one."""
    template = "{% for m in messages %}{% if 'REFUSED' in m.content %}{{ raise_exception('no') }}{% endif %}"
    template += "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    changes = {"chat_template": template, "reward__epochs": 1}
    assert cli("run", write_recipe(tmp_path, recipe("reward", **changes)), "--run-dir", "run").code == 0
    asked = ["REFUSED", *"bcdefghij"]
    said = {side: [f"\n\nHuman: {what}\n\nAssistant: {side}" for what in asked] for side in ("yes", "no")}
    rows = [{"good": yes, "bad": no, "kind": "k"} for yes, no in zip(said["yes"], said["no"], strict=True)]
    write_jsonl(tmp_path / "theirs.jsonl", rows)
    columns = ["pairs.columns.chosen=good", "pairs.columns.rejected=bad"]
    command = ["evaluate-reward", "run", "theirs.jsonl", *columns]
    refused = cli(*command, "--out", "refused")
    assert isinstance(refused.error, Failure)
    assert (refused.code, refused.error.kind, refused.error.key, refused.error.row) == (2, "invalid", "PAIRS", 1)
    for settings, subset in ((["pairs.columns.subset=kind"], "k"), (["pairs.format=hh_rlhf"], "all")):
        found = cli(*command, *settings, "max_bad_share=0.1", "--second", "run", "--out", subset)
        assert found.code == 0, found
        line = json.loads(found.out)
        assert (line["n"], {name: of["n"] for name, of in line["subsets"].items()}) == (9, {subset: 9})
    unknown = cli(*command, "pairs.colums.x=y", "--out", "unknown")
    assert (unknown.code, getattr(unknown.error, "kind", None)) == (2, "unknown")


def test_a_response_that_was_cut_is_scored_without_an_end(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    """As the reward stage trains on it; and no longer pair than there is seen."""
    path = write_recipe(tmp_path, recipe("reward", reward__max_length=16))
    assert cli("run", path, "--run-dir", "run").code == 0
    prompts, responses = [row["prompt"] for row in PAIRS], [row["chosen"] + " and on and on" for row in PAIRS]
    backbone, codec = find_role(tmp_path / "run", "reward").load("reward", dtype="float32", device="cpu")
    for cut in (True, False):
        scores = reward_scores(str(tmp_path / "run"), as_trained=True)(prompts, responses, [cut] * len(prompts))
        for prompt, response, score in zip(prompts, responses, scores, strict=True):
            end = [] if cut else [codec.end_token_id]
            ids = codec.encode_prompt(prompt), [*codec.tokenizer(response, add_special_tokens=False).input_ids, *end]
            whole = ids[1][:15]
            with torch.no_grad(), backbone.role("reward"):
                expected = backbone(torch.tensor([[*ids[0][-(16 - len(whole)) :], *whole]])).logits[0, 0].item()
            assert score == pytest.approx(expected, abs=1e-4)
