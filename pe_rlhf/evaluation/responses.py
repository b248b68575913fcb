"""One evaluation: responses of a candidate and a baseline, a judge's verdicts on them, and the result.

Everything is in one folder and written as it comes, so the same command goes on where it was interrupted:
`candidate.jsonl`, `baseline.jsonl` (the responses), `verdicts.jsonl` (one line per question), `summary.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from pe_rlhf.config.evaluate import EvaluationSettings
from pe_rlhf.config.reward_source import RewardSource
from pe_rlhf.data.rows import say_bad_rows
from pe_rlhf.evaluation.prompting import Prompting, columns_of, own_tokenizer, prompting_of
from pe_rlhf.evaluation.sources import (
    ResponseSource,
    ServerSource,
    base_of_adapter,
    find_policy,
    load_anchor,
    load_source,
    read_outputs,
)
from pe_rlhf.evaluation.suites import Suite
from pe_rlhf.model.names import check_model_name
from pe_rlhf.runs.layout import EvaluationFiles
from pe_rlhf.runs.own_output import content_hash, refuse_other_question
from pe_rlhf.runs.saved_roles import SavedRole, is_endpoint, weights_of
from pe_rlhf.scoring.model_judges import ask_judge
from pe_rlhf.scoring.prompt_checks import prompt_check
from pe_rlhf.system.files import append_jsonl, read_jsonl, write_json, write_jsonl
from pe_rlhf.system.progress import progress, say
from reward.asking import Pair
from reward.errors import InputError
from reward.judges import Judge
from reward.records import NO_COLUMNS, Prompt, parse_rows
from reward.summary import summarise

Summary = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """The candidate or the baseline: a source that is loaded when it is needed, or finished `outputs`.

    identity: all that the responses depend on; a folder with responses of another identity is refused.
    """

    name: str
    identity: str
    load: Callable[[], ResponseSource] | None = None
    outputs: Sequence[str] | None = None
    prompting: Prompting | None = None


def side_of(
    side: str, name: str, prompts: Sequence[Prompt], settings: EvaluationSettings, anchor_of: SavedRole | None = None
) -> Side:
    """The `candidate` or `baseline` of that name; with `anchor_of` it is the anchor of that run.

    Raises `InputError` where there is nothing of that name, or a file lacks the output of a prompt.
    """
    if anchor_of is None and Path(name).is_file():
        return Side(name, name, outputs=_outputs_for(prompts, Path(name)))
    parts = [name, settings.sampler.model_dump(), settings.seed, settings.dtype, weights_of(name, "policy")]
    if anchor_of is not None:
        recipe = anchor_of.recipe
        parts.append(None if recipe is None else [recipe.chat_template, recipe.backbone.dtype])
    if anchor_of is None and is_endpoint(name):
        return Side(name, json.dumps(parts), load=partial(load_source, name, settings, Prompting(None)))
    found = anchor_of or find_policy(name)
    base = None if found else base_of_adapter(name)
    if found is None and base is None:
        check_model_name(name)
    prompting = prompting_of(side, name, settings, found, base)
    # By itself a model's or run's template goes with its name.
    if getattr(settings, f"{side}_template") != "auto" or (base is not None and own_tokenizer(name) is not None):
        parts.append(prompting.template)
    # Both are left out where there are none, as in the folders of earlier versions.
    parts += [part for part in (prompting.arguments, prompting.date) if part]
    load = partial(load_anchor, anchor_of) if anchor_of else partial(load_source, name)
    return Side(name, json.dumps(parts), load=partial(load, settings, prompting), prompting=prompting)


def without_too_long(
    prompts: list[Prompt],
    sides: dict[str, Side],
    settings: EvaluationSettings,
    rewards: Sequence[RewardSource] = (),
) -> tuple[list[Prompt], dict[str, Side]]:
    """The prompts that every local side takes, as a run's evaluate stage does it, and the sides with outputs for them.

    The templates of the `rewards`' models and of the judge's take them, too. Raises `InputError` where none is left,
    and where templates refuse more than `max_bad_share` of them.
    """
    check, columns = prompt_check(rewards, settings.judge), columns_of(prompts, settings) if rewards else NO_COLUMNS
    local = [side.prompting for side in sides.values() if side.prompting is not None]
    new_tokens = settings.sampling.max_new_tokens

    def looked_at(row: Mapping[str, object]) -> tuple[int, bool]:
        number = row["number"]
        assert isinstance(number, int)
        check(prompts[number], {name: values[number] for name, values in columns.items()})
        return number, all(prompting.takes(prompts[number], new_tokens) for prompting in local)

    numbered = ({"number": number} for number in range(len(prompts)))
    found, refused = parse_rows(numbered, looked_at, "the prompts", settings.max_bad_share, "--prompts")
    say_bad_rows("--prompts", refused)
    kept = [number for number, takes in found if takes]
    if len(kept) == len(prompts):
        return prompts, sides
    what = "empty as tokens, or too long for a response of sampling.max_new_tokens"
    if not kept:
        raise InputError(f"every prompt is {what} {new_tokens}", kind="too_long", key="sampling.max_new_tokens")
    if len(kept) < len(found):
        say(f"left out {len(found) - len(kept)} of {len(prompts)} prompts, {what}")
    cut = {
        name: side if side.outputs is None else replace(side, outputs=[side.outputs[i] for i in kept])
        for name, side in sides.items()
    }
    return [prompts[i] for i in kept], cut


def _outputs_for(prompts: Sequence[Prompt], path: Path) -> list[str]:
    """The output of each prompt in a file."""
    by_prompt: dict[str, list[str]] = {}
    for prompt, response in read_outputs(path):
        by_prompt.setdefault(json.dumps(prompt), []).append(response)
    outputs: list[str] = []
    for number, prompt in enumerate(prompts):
        if not (left := by_prompt.get(json.dumps(prompt))):
            raise InputError(
                f"{path} has no output for prompt {number}, {json.dumps(prompt)[:60]}",
                kind="missing",
                file=path,
                row=number + 1,
            )
        # A prompt with several outputs gets them in their order, and the last one for all further samples.
        outputs.append(left.pop(0) if len(left) > 1 else left[0])
    return outputs


def check_sides(sides: Iterable[tuple[Side, Sequence[Prompt], Path]], settings: EvaluationSettings) -> None:
    """Raise where a server does not answer of which responses are still to come, before any side is sampled.

    With each side come its prompts and the file of its responses, which may be whole already.
    """
    for side, prompts, path in sides:
        if side.outputs is None and is_endpoint(side.name):
            head = _head(side.identity, prompts)
            if len(_finished(path, head, prompts)) < len(prompts):
                ServerSource(side.name, settings).check_server()


def responses_of(side: Side, prompts: Sequence[Prompt], path: Path) -> list[str]:
    """One response per prompt; those that are in the file already are not sampled again.

    The first line of the file is the identity of the rest. Raises `InputError` where that is another one.
    """
    if side.outputs is not None:
        return list(side.outputs)

    def sampled(start: int) -> Iterator[dict[str, Any]]:
        assert side.load is not None
        return ({"response": response} for response in side.load().responses(prompts, start))

    rows = rows_of(path, side.identity, prompts, f"sampling {side.name}", sampled)
    return [row["response"] for row in rows]


def rows_of(
    path: Path,
    identity: str,
    prompts: Sequence[Prompt],
    title: str,
    sample: Callable[[int], Iterator[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """What was found for each prompt, from a file that goes on where it was interrupted.

    sample: gives what belongs to prompts[start:], one after the other. Raises `InputError` where the file's first line
    is of another identity, or of other prompts.
    """
    head = _head(identity, prompts)
    done = _finished(path, head, prompts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, (head, *done))
    if len(done) < len(prompts):
        with progress(title, len(prompts) - len(done), "responses") as advance:
            for found in sample(len(done)):
                done.append({"prompt": prompts[len(done)], **found})
                append_jsonl(path, done[-1])
                advance(1)
    return done


def evaluate_pairs(
    judge: Judge,
    pairs: Sequence[Pair],
    folder: Path,
    names: tuple[str, str],
    settings: EvaluationSettings,
    suite: Suite | None = None,
    difficulty: Sequence[float] | None = None,
    beside: Callable[[], Summary] = dict,
) -> Summary:
    """Have all pairs judged and write `verdicts.jsonl` and `summary.json`; `names` of candidate and baseline.

    difficulty: of each prompt by position, for the length-controlled win-rate. beside: finds what else the summary
    says. Raises as `judge_pairs`, and `InputError` where a result of something else is there.
    """
    candidate, baseline = names
    files, version = EvaluationFiles(folder), getattr(judge, "version", "")
    asked = {
        "candidate": candidate,
        "baseline": baseline,
        "judge": judge.identity,
        "judge_version": version,
        "suite": suite and suite.name,
        "level": settings.level,
        "best_of": settings.policy.best_of,
        "content": content_hash([[astuple(pair) for pair in pairs], difficulty and list(difficulty)]),
    }
    refuse_other_question(files.summary, asked)
    outcomes = ask_judge(
        judge, pairs, files.verdicts, title="judging", names=names, max_invalid=settings.max_invalid_share
    )
    result = summarise(candidate, outcomes, difficulty, settings.level)
    summary = {**result, "baseline": baseline, "judge": judge.identity}
    if version:
        summary["judge_version"] = version
    if suite is not None:
        summary |= {"suite": suite.name, **suite.score(outcomes, result)}
    summary |= beside() | {"asked": asked}
    write_json(files.summary, summary)
    return summary


def _head(identity: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
    return {"identity": identity, "prompts": content_hash(list(prompts))}


def _finished(path: Path, head: dict[str, Any], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The rows in the file, up to one that a kill left half written or that belongs to another prompt."""
    rows = read_jsonl(path, may_be_cut=True)
    if not rows:
        return []
    if rows[0] != head and len(rows) > 1:  # a file with nothing but a head holds nothing to lose
        raise InputError(
            f"{path} holds responses to other prompts, of another policy, or with other settings",
            kind="changed",
            file=path,
            fix="use another --out",
        )
    pairs = zip(prompts, rows[1:], strict=False)
    return [row for _, row in takewhile(lambda pair: pair[0] == pair[1]["prompt"], pairs)]
