"""`pe-rlhf evaluate`: how often a judge prefers one policy to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pe_rlhf.config.evaluate import EvaluationSettings
    from pe_rlhf.runs.saved_roles import SavedRole
    from reward.records import Prompt

RESPONSES = "a run, a PEFT adapter, a model, a server (http://HOST/v1#MODEL), or a file of outputs"


def evaluate(
    candidate: Annotated[str, typer.Argument(help=f"The policy that is judged: {RESPONSES}.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings: judge.max_requests=2000 judge.concurrency=8 sampling.temperature=0.7 seed=1 …; all are in"
            " docs/recipe.md.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="length, llm:MODEL, rating:MODEL, reward_model:RUN or MODEL, jury:ONE,TWO, or your module:callable."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="The policy that it is compared with; default: the anchor of a run, the base of an adapter."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A data file or hub id; default: the prompts of a file of outputs. As in a recipe, settings say more:"
            " prompts.columns.prompt=question prompts.format=hh_rlhf prompts.split=test."
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="alpaca_eval, arena_hard or mt_bench: its prompts, its baseline's answers and its template."),
    ] = None,
    suite_data: Annotated[
        Path | None, typer.Option(help="The folder with the suite's files; default: they come from the hub.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of this evaluation; the same one resumes.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first prompts, this many.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compare two policies on the same prompts and print the result as one JSON line.

    A judge that sees an order is asked in both orders. Every verdict is on disk before the next question, so the same
    command goes on with an interrupted evaluation. report.html in its folder shows the pairs side by side.
    """
    settings = _settings(judge, prompts, suite, suite_data, overrides or [])

    # Imported here: torch and transformers take seconds, and a mistake in the settings should be reported at once.
    from pe_rlhf.data.codec import dated
    from pe_rlhf.evaluation.sources import find_policy
    from pe_rlhf.scoring.model_judges import check_judge, check_server
    from reward.judges.user_code import time_limit

    found = find_policy(candidate)
    day = settings.date or (None if found is None or found.recipe is None else found.recipe.date)
    with time_limit(settings.function_timeout), dated(day):
        check_judge(settings.judge)
        check_server(settings.judge)
        if suite is not None:
            _evaluate_suite(suite, suite_data, candidate, against, out, limit, settings)
        else:
            _evaluate_prompts(candidate, against, out, limit, settings)


def _evaluate_prompts(
    candidate: str, against: str | None, out: Path | None, limit: int | None, settings: EvaluationSettings
) -> None:
    """Compare both sides on the prompts of a data set, or of a file of outputs."""
    from pe_rlhf.evaluation.best_of_run import best_of_run, rewarded_run
    from pe_rlhf.evaluation.prompting import refuse_different_prompting
    from pe_rlhf.evaluation.responses import check_sides, evaluate_pairs, responses_of, side_of, without_too_long
    from pe_rlhf.report.evaluation_page import write_evaluation_report
    from pe_rlhf.report.format import slug
    from pe_rlhf.runs.layout import EvaluationFiles
    from pe_rlhf.runs.own_output import claim_evaluation
    from pe_rlhf.scoring.model_judges import ask_judge, make_judge
    from pe_rlhf.system.files import locked
    from reward.asking import make_pairs

    baseline, trained = _baseline(candidate, against)
    n = settings.policy.best_of
    run = None if n is None else rewarded_run(candidate)
    asked = _prompts(candidate, baseline, settings)[:limit]
    sides = {
        "candidate": side_of("candidate", candidate, asked, settings),
        "baseline": side_of("baseline", baseline, asked, settings, anchor_of=trained),
    }
    refuse_different_prompting(sides["candidate"].prompting, sides["baseline"].prompting, settings)
    asked, sides = without_too_long(asked, sides, settings, [] if run is None else run.ppo.reward)
    folder = out or Path("evaluations") / "-".join(map(slug, (candidate, "vs", baseline, settings.judge.kind)))
    claim_evaluation(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        # First the judge: a missing key or model should be reported before anything is sampled.
        built = make_judge(settings.judge)
        files = EvaluationFiles(folder)
        check_sides(((side, asked, files.responses(name)) for name, side in sides.items()), settings)
        texts = {name: responses_of(side, asked, files.responses(name)) for name, side in sides.items()}
        pairs = make_pairs(asked, texts["candidate"], texts["baseline"])

        def best_of() -> dict[str, Any]:
            if n is None or run is None:
                return {}
            prompting = sides["candidate"].prompting
            assert prompting is not None
            best, kl = best_of_run(run, n, asked, prompting, settings, folder)
            names, title = (f"best of {n}", baseline), f"judging the best of {n}"
            against_it = make_pairs(asked, best.texts, texts["baseline"])
            share = settings.max_invalid_share
            outcomes = ask_judge(built, against_it, files.best_of_verdicts, title=title, names=names, max_invalid=share)
            return {"kl": kl, **best.metrics(outcomes)}

        summary = evaluate_pairs(built, pairs, folder, (candidate, baseline), settings, beside=best_of)
        typer.echo(json.dumps(summary, ensure_ascii=False))
        typer.echo(f"report: {write_evaluation_report(folder, pairs).resolve()}", err=True)


def _settings(
    judge: str | None, prompts: str | None, suite: str | None, suite_data: Path | None, overrides: list[str]
) -> EvaluationSettings:
    """The settings of an evaluation; those of a suite are defaults. Raises `InputError` where there is no judge."""
    from pe_rlhf.config.evaluate import EvaluationSettings
    from pe_rlhf.config.load import apply_overrides, validated
    from reward.errors import InputError

    tree: dict[str, Any] = {key: value for key, value in (("judge", judge), ("prompts", prompts)) if value is not None}
    apply_overrides(tree, overrides)
    if "judge" not in tree:
        raise InputError("--judge is missing", kind="missing", key="--judge")
    if suite is not None:
        from pe_rlhf.evaluation.suites import find_suite

        find_suite(suite).set_defaults(tree, suite_data)
    settings = validated(EvaluationSettings, tree, "settings", overrides)
    if suite is not None and settings.policy.best_of is not None:
        raise InputError(
            "policy.best_of: the answers of a suite are not chosen by a reward",
            kind="conflict",
            key="policy.best_of",
            fix="leave it out, or use --prompts",
        )
    return settings


def _baseline(candidate: str, against: str | None) -> tuple[str, SavedRole | None]:
    """What the candidate is compared with, and the candidate's own role where that is its anchor.

    Raises `InputError` where the candidate has no base and no baseline is named.
    """
    from pe_rlhf.evaluation.sources import base_of_adapter, find_policy
    from pe_rlhf.runs.saved_roles import is_endpoint
    from reward.errors import InputError

    trained = None if against else find_policy(candidate)
    if baseline := against or (trained.base if trained else base_of_adapter(candidate)):
        return baseline, trained
    if not Path(candidate).exists() and not is_endpoint(candidate):
        raise InputError(
            f"there is no run, adapter or file {candidate} here",
            kind="missing",
            key="CANDIDATE",
            file=candidate,
            fix="a model from the hub needs --against",
        )
    raise InputError(
        f"--against is missing: {candidate} is neither a run nor an adapter and has no base",
        kind="missing",
        key="--against",
    )


def _evaluate_suite(
    name: str,
    data: Path | None,
    candidate: str,
    against: str | None,
    out: Path | None,
    limit: int | None,
    settings: EvaluationSettings,
) -> None:
    """The same for a suite; without `against` the baseline is the suite's."""
    from pe_rlhf.evaluation.responses import evaluate_pairs
    from pe_rlhf.evaluation.suite_run import suite_pairs
    from pe_rlhf.evaluation.suites import find_suite
    from pe_rlhf.report.evaluation_page import write_evaluation_report
    from pe_rlhf.report.format import slug
    from pe_rlhf.runs.own_output import claim_evaluation
    from pe_rlhf.scoring.model_judges import make_judge
    from pe_rlhf.system.files import locked
    from reward.verdicts import read_difficulty

    suite = find_suite(name)
    items = suite.load(data, with_answers=against is None)
    table = suite.difficulties(data)
    difficulty = None if table is None else read_difficulty(table)
    folder = out or Path("evaluations") / "-".join(map(slug, (candidate, name, settings.judge.kind)))
    claim_evaluation(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        built = make_judge(settings.judge)
        pairs = suite_pairs(items[:limit], candidate, against, folder, settings)
        names = (candidate, against or suite.baseline)
        summary = evaluate_pairs(built, pairs, folder, names, settings, suite, difficulty)
        typer.echo(json.dumps(summary, ensure_ascii=False))
        typer.echo(f"report: {write_evaluation_report(folder, pairs).resolve()}", err=True)


def _prompts(candidate: str, baseline: str, settings: EvaluationSettings) -> list[Prompt]:
    """The prompts that are named, otherwise those of the first file of outputs."""
    from pe_rlhf.data.rows import load_prompts
    from pe_rlhf.evaluation.sources import read_outputs
    from reward.errors import InputError

    if settings.prompts is not None:
        return load_prompts(settings.prompts, "--prompts", settings.max_bad_share)
    file = next((Path(name) for name in (candidate, baseline) if Path(name).is_file()), None)
    if file is None:
        raise InputError(
            "--prompts is missing, and there is no file of outputs to take them from", kind="missing", key="--prompts"
        )
    return [prompt for prompt, _ in read_outputs(file)]
