"""The preferences stage: what its file says about the responses that were sampled."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.config import Recipe, SamplingConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.scoring.model_judges import make_judge
from pe_rlhf.stages.preferences import _margin, _row
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.seeding import derive_seed
from pe_rlhf.types import Rollout
from reward.asking import Pair
from reward.judges import Comparison, Verdict
from reward.judges.judge_settings import JudgeSettings
from reward.records import load_records
from reward.summary import Outcome
from tests.failures import raises
from tests.runs import Tree, read_jsonl
from tests.stage_support import byte_model, run, write_prompts

PROMPTS = [f"Prompt {i}:" for i in range(12)]
NEW_TOKENS = 10
# Every fourth byte ends a response, so that most end before the limit and some are cut.
ENDS = list(range(0, 258, 12))


def recipe(folder: Path, judge: str | Tree = "reward.scores:length", **settings: Any) -> Tree:
    model = byte_model(folder / "model", pad_is_eos=True, initializer_range=0.3, eos_token_id=ENDS)
    preferences = {
        "prompts": write_prompts(folder / "prompts.jsonl", PROMPTS),
        "judge": judge,
        "sampling": {"max_new_tokens": NEW_TOKENS},
        **settings,
    }
    return {"model": str(model), "seed": 3, "threads": 1, "preferences": preferences}


def pairs(folder: Path) -> list[Tree]:
    return read_jsonl(folder / "run" / "preferences" / "preferences.jsonl")


def sampled(tree: Tree, per_prompt: int = 1) -> list[tuple[str, str, bool]]:
    """Prompt, text and whether it was cut, of every response that the stage samples."""
    backbone = load_backbone(tree["model"])
    codec = TextCodec(backbone.tokenizer)
    prompts = PROMPTS * per_prompt * 2
    engine = HFRollout(backbone, "anchor", SamplingConfig(max_new_tokens=NEW_TOKENS))
    seed = derive_seed(Recipe.model_validate(tree).seed, "preferences")
    rollout = engine.generate([codec.encode_prompt(prompt) for prompt in prompts], seed)
    texts = [codec.decode(ids) for ids in rollout.responses]
    return list(zip(prompts, texts, rollout.truncated_B.tolist(), strict=True))


def test_the_file_holds_what_was_sampled(tmp_path: Path) -> None:
    tree = recipe(tmp_path, pairs_per_prompt=2)
    summary = run(tree, tmp_path / "run")["preferences"]
    rows = pairs(tmp_path)
    responses = sampled(tree, per_prompt=2)
    known = Counter(responses)
    written: Counter[tuple[str, str, bool]] = Counter()
    for row in rows:
        assert row["score_chosen"] == len(row["chosen"]) > row["score_rejected"] == len(row["rejected"])
        for side in ("chosen", "rejected"):
            written[(row["prompt"], row[side], row[f"{side}_truncated"])] += 1
    assert written <= known  # each response is one that was sampled, no response is used twice, and its flag is its own
    assert len({cut for _, _, cut in written}) == 2

    # First and second responses to a prompt face each other; a tie or an empty text drops the pair.
    firsts, seconds = responses[:24], responses[24:]
    faced = [(a[1], b[1]) for a, b in zip(firsts, seconds, strict=True)]
    kept = [{a, b} for a, b in faced if len(a) != len(b) and a.strip() and b.strip()]
    assert [{row["chosen"], row["rejected"]} for row in rows] == kept
    assert 0 < len(kept) < 24
    assert (summary["prompts"], summary["pairs"], summary["pairs_dropped"]) == (12, len(kept), 24 - len(kept))
    assert summary["mean_score_chosen"] == pytest.approx(sum(row["score_chosen"] for row in rows) / len(rows))
    assert summary["mean_score_rejected"] == pytest.approx(sum(row["score_rejected"] for row in rows) / len(rows))


def test_every_row_is_a_preference_record(tmp_path: Path) -> None:
    run(recipe(tmp_path), tmp_path / "run")
    rows = pairs(tmp_path)
    records, bad = load_records(rows, "preferences.jsonl", max_bad_share=0)
    assert bad == []
    read = [(r.prompt, r.chosen, r.rejected, r.chosen_truncated, r.rejected_truncated) for r in records]
    keys = ("prompt", "chosen", "rejected", "chosen_truncated", "rejected_truncated")
    assert read == [tuple(row[key] for key in keys) for row in rows]


def test_a_minimum_margin_drops_close_pairs(tmp_path: Path) -> None:
    run(recipe(tmp_path), tmp_path / "run")
    everything = pairs(tmp_path)
    run(recipe(tmp_path, min_margin=3), tmp_path / "wide" / "run")
    wide = pairs(tmp_path / "wide")
    assert wide == [row for row in everything if row["score_chosen"] - row["score_rejected"] > 3]
    assert 0 < len(wide) < len(everything)


def test_a_chat_model_labels_in_both_orders(tmp_path: Path) -> None:
    judge_model = byte_model(tmp_path / "judge", pad_is_eos=True, initializer_range=0.4, max_position_embeddings=2048)
    # Random weights give the labels next to no probability; their ratio is a verdict all the same, if it is asked for.
    settings = JudgeSettings(kind="llm", target=str(judge_model), verdict="probabilities", min_label_mass=0)
    summary = run(recipe(tmp_path, settings.model_dump()), tmp_path / "run")["preferences"]
    responses = sampled(recipe(tmp_path))
    firsts, seconds = responses[: len(PROMPTS)], responses[len(PROMPTS) :]
    judge = make_judge(settings)
    expected, flips = [], 0
    for (prompt, first, _), (_, second, _) in zip(firsts, seconds, strict=True):
        (forward,) = judge.compare([Comparison(prompt, first, second)])
        (backward,) = judge.compare([Comparison(prompt, second, first)])
        if (forward.preference > 0.5) == (backward.preference > 0.5):
            flips += 1
        elif first.strip() and second.strip() and first.strip() != second.strip():
            expected.append((first, second) if forward.preference > 0.5 else (second, first))
    rows = pairs(tmp_path)
    assert [(row["chosen"], row["rejected"]) for row in rows] == expected
    assert 0 < flips == summary["flips"]
    assert all(0.5 < row["preference"] <= 1 and "score_chosen" not in row for row in rows)
    assert "mean_score_chosen" not in summary

    # Without scores the margin is that of the probabilities.
    margins = sorted(2 * row["preference"] - 1 for row in rows)
    between = (margins[0] + margins[-1]) / 2
    run(recipe(tmp_path, settings.model_dump(), min_margin=between), tmp_path / "wide" / "run")
    assert pairs(tmp_path / "wide") == [row for row in rows if 2 * row["preference"] - 1 > between]


def judge_module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, score: str) -> str:
    """A judge of one expression over `i` and `text`, as a module that can be imported."""
    (folder / f"{name}.py").write_text(
        f"def score(prompts, responses):\n    return [float({score}) for i, text in enumerate(responses)]\n"
    )
    monkeypatch.syspath_prepend(folder)
    return f"{name}:score"


def test_nothing_but_ties_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = judge_module(tmp_path, monkeypatch, "indifferent_judge", "1")
    with raises("empty", key="preferences.judge"):
        run(recipe(tmp_path, judge), tmp_path / "run")
    assert not (tmp_path / "run" / "preferences" / "summary.json").exists()
    assert not (tmp_path / "run" / "preferences" / "preferences.jsonl").exists()


def test_responses_that_differ_only_by_white_space_are_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a row would be refused when it is read."""
    monkeypatch.setattr(TextCodec, "decode", lambda _, ids: "same" + " " * len(ids))
    with raises("empty", key="preferences.judge"):
        run(recipe(tmp_path), tmp_path / "run")


def test_scores_are_in_a_row_where_the_judge_gives_one_to_both() -> None:
    """With one score only the margin is that of the probabilities, by hand 2·0.8 − 1."""

    def row(a: float | None, b: float | None) -> Tree:
        made = _row(Pair("Why?", "yes", "no", 0), Outcome((Verdict(0.2, score_a=a, score_b=b),)), False, True)
        assert made is not None
        return made

    both = row(1.5, 4.0)
    assert (both["chosen"], both["rejected"], both["preference"]) == ("no", "yes", 0.8)
    assert (both["chosen_truncated"], both["rejected_truncated"]) == (True, False)
    assert (both["score_chosen"], both["score_rejected"], _margin(both)) == (4.0, 1.5, 2.5)
    for one in (row(1.5, None), row(None, 4.0), row(None, None)):
        assert not {"score_chosen", "score_rejected"} & one.keys()
        assert _margin(one) == pytest.approx(0.6)


def test_responses_that_are_not_the_anchors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler of another model: its log-probs are half a nat from the anchor's."""
    summary = run(recipe(tmp_path), tmp_path / "run")["preferences"]
    assert 0 <= summary["logprob_mismatch"] < 1e-5
    generate = HFRollout.generate

    def of_another(self: HFRollout, *asked: Any) -> Rollout:
        rollout = generate(self, *asked)
        return replace(rollout, logprobs=[[value - 0.5 for value in row] for row in rollout.logprobs])

    monkeypatch.setattr(HFRollout, "generate", of_another)
    with raises("mismatch", TrainingError):
        run(recipe(tmp_path), tmp_path / "other")
    summary = run(recipe(tmp_path, sampling={"max_new_tokens": NEW_TOKENS, "mismatch_limit": 1}), tmp_path / "let")
    assert summary["preferences"]["logprob_mismatch"] == pytest.approx(0.5, abs=1e-4)
