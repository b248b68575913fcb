"""`pe-rlhf evaluate`: how often one policy beats another in a judge's eyes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from pe_rlhf.config import SamplingConfig
    from pe_rlhf.evaluation.responses import Source
    from pe_rlhf.runs.saved_roles import RoleFolder
    from reward.records import Prompt

T = TypeVar("T")

RESPONSES = "a run, a PEFT adapter, a model, a server (http://HOST/v1#MODEL), or a file of outputs"


def evaluate(
    policy: Annotated[str, typer.Argument(help=f"Whose responses are judged: {RESPONSES}.")],
    judge: Annotated[
        str, typer.Option(help="length, llm:MODEL, reward_model:RUN or MODEL, or your own as module:callable.")
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="What it is compared with, likewise; left out, the anchor of a run or the base of an adapter."
        ),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A data file or hub id with a column `prompt`; a file of outputs has its own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of this evaluation; the same one resumes.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take that many prompts, the first ones.")] = None,
    template: Annotated[
        str, typer.Option(help="llm: general, helpfulness, harmlessness, summarization, or a jinja2 file.")
    ] = "general",
    reasoning: Annotated[bool, typer.Option("--reasoning", help="llm: reason first.")] = False,
    verdict: Annotated[str, typer.Option(help="llm: probabilities (of A and B), text, or auto.")] = "auto",
    judge_engine: Annotated[str, typer.Option(help="llm: what runs a local model: hf or vllm.")] = "hf",
    base_url: Annotated[str | None, typer.Option(help="llm: an OpenAI-compatible server.")] = None,
    api_key_env: Annotated[str, typer.Option(help="The environment variable with the key.")] = "OPENAI_API_KEY",
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests to a server at once, be it the judge or a policy.")
    ] = 8,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for one request.")] = 60.0,
    attempts: Annotated[int, typer.Option(min=1, help="Tries of a request that fails for a passing reason.")] = 6,
    max_requests: Annotated[int | None, typer.Option(min=1, help="Stop after that many requests to a server.")] = None,
    max_cost: Annotated[float | None, typer.Option(help="Stop at that cost; needs both prices.")] = None,
    price_in: Annotated[float | None, typer.Option(help="Per million tokens that the judge reads.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Per million tokens that it writes.")] = None,
    max_invalid: Annotated[
        float, typer.Option(min=0, max=1, help="Fail above this share of pairs without a valid verdict.")
    ] = 0.05,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.001, help="Of the responses.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses sampled at once.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the responses.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of local models: float32, bfloat16, float16; a run's are in its recipe's.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Of local models: auto, cpu, cuda, …")] = "auto",
    level: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compare two policies on the same prompts and print the result as one JSON line.

    Judges that see an order are asked both ways. Every verdict is on disk before the next question, so an interrupted
    evaluation goes on with the same command; report.html in its folder shows the pairs side by side.
    """
    from pe_rlhf.config import SamplingConfig
    from pe_rlhf.evaluation.responses import evaluate_pairs, responses_of
    from pe_rlhf.evaluation.sources import base_of_adapter, find_policy
    from pe_rlhf.report.evaluation_page import write_evaluation_report
    from pe_rlhf.report.format import slug
    from pe_rlhf.runs.layout import EvaluationFiles
    from pe_rlhf.scoring.model_judges import JudgeConfig, build_judge, check_judge
    from pe_rlhf.system.files import locked
    from reward.asking import make_pairs
    from reward.errors import InputError
    from reward.judges.judge_registry import split_judge_name

    kind, target = split_judge_name(judge)
    fields = {"template": template, "reasoning": reasoning, "verdict": verdict, "base_url": base_url}
    server = {"api_key_env": api_key_env, "concurrency": concurrency, "timeout": timeout, "attempts": attempts}
    server |= {"max_requests": max_requests, "max_cost": max_cost, "price_in": price_in, "price_out": price_out}
    fields |= {"engine": judge_engine, **server}
    judge_config = _validated(JudgeConfig, kind=kind, target=target, dtype=dtype, device=device, **fields)
    check_judge(judge_config)
    sampling = _validated(SamplingConfig, max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size)
    trained = None if against else find_policy(policy)
    baseline = against or (trained.base if trained else base_of_adapter(policy))
    if baseline is None:
        raise InputError(f"--against is missing: {policy} is neither a run nor an adapter, so it has no base")
    asked = _prompts(prompts, policy, baseline, limit)
    source = partial(_source, asked, sampling, seed, dtype, device, server)
    sources = {"candidate": source(policy), "baseline": source(baseline, anchor_of=trained)}
    folder = out or Path("evaluations") / "-".join(map(slug, (policy, "vs", baseline, judge)))
    files = EvaluationFiles(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        # The judge first: a key that is missing or a model that cannot be loaded is to be known before it is sampled.
        built = build_judge(judge_config)
        texts = {side: responses_of(s, asked, files.responses(side)) for side, s in sources.items()}
        pairs = make_pairs(asked, texts["candidate"], texts["baseline"])
        summary = evaluate_pairs(
            built, pairs, folder, candidate=policy, baseline=baseline, max_invalid_share=max_invalid, level=level
        )
        typer.echo(json.dumps(summary, ensure_ascii=False))
        typer.echo(f"report: {write_evaluation_report(folder, pairs).resolve()}", err=True)


def _prompts(named: str | None, policy: str, baseline: str, limit: int | None) -> list[Prompt]:
    """The prompts that are named, else those of the first file of outputs."""
    from pe_rlhf.config import DataSource
    from pe_rlhf.data.rows import load_prompts
    from pe_rlhf.evaluation.sources import read_outputs
    from reward.errors import InputError

    if named is not None:
        prompts = load_prompts(DataSource(path=named), "--prompts")
    else:
        file = next((Path(name) for name in (policy, baseline) if Path(name).is_file()), None)
        if file is None:
            raise InputError("--prompts is missing, and there is no file of outputs to take them from")
        prompts = [prompt for prompt, _ in read_outputs(file)]
    return prompts[:limit]


def _source(
    prompts: list[Prompt],
    sampling: SamplingConfig,
    seed: int,
    dtype: str,
    device: str,
    server: dict[str, Any],
    name: str,
    anchor_of: RoleFolder | None = None,
) -> Source:
    """Where one side's responses come from; `anchor_of` is the run whose anchor that name stands for."""
    from pe_rlhf.evaluation.responses import Source
    from pe_rlhf.evaluation.sources import base_of_adapter, find_policy, load_anchor, load_policy, read_outputs
    from pe_rlhf.model.names import check_model_name
    from pe_rlhf.runs.saved_roles import is_endpoint, weights_of
    from reward.errors import InputError

    if anchor_of is not None:
        recipe = anchor_of.recipe
        prompted = None if recipe is None else [recipe.chat_template, recipe.backbone.dtype]
        identity = json.dumps([name, sampling.model_dump(), seed, dtype, weights_of(name, "ppo"), prompted])
        load = partial(load_anchor, anchor_of, sampling, seed, dtype=dtype, device=device)
        return Source(name, identity, load=load)
    if Path(name).is_file():
        by_prompt: dict[str, list[str]] = {}
        for prompt, response in read_outputs(Path(name)):
            by_prompt.setdefault(json.dumps(prompt), []).append(response)
        outputs: list[str] = []
        for number, prompt in enumerate(prompts):
            if not (left := by_prompt.get(json.dumps(prompt))):
                raise InputError(f"{name} has no output for prompt {number}, {json.dumps(prompt)[:60]}")
            # A prompt that stands there several times is answered in that order, the last answer for all further ones.
            outputs.append(left.pop(0) if len(left) > 1 else left[0])
        return Source(name, name, outputs=outputs)
    if not is_endpoint(name) and find_policy(name) is None and base_of_adapter(name) is None:
        check_model_name(name)
    identity = json.dumps([name, sampling.model_dump(), seed, dtype, weights_of(name, "ppo")])
    options = {"dtype": dtype, "device": device, "server": server}
    return Source(name, identity, load=partial(load_policy, name, sampling, seed, **options))


def _validated(schema: type[T], **fields: Any) -> T:
    from pydantic import ValidationError

    from reward.errors import InputError

    try:
        return schema(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # a rule over several options
            raise InputError(first["msg"].removeprefix("Value error, ")) from error
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(f"{option}: {first['msg']} (got {first['input']!r})") from error
