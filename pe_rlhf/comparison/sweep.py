"""The parts of a comparison in their order: the shared stages, the trials of learning rates, the runs of the arms."""

from __future__ import annotations

from pe_rlhf.comparison.plan import Plan, PlannedRun
from pe_rlhf.comparison.runner import Slice, refuse_changed, run_all, run_to_end, state_of
from pe_rlhf.comparison.trials import choose
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.metrics import read_summary
from pe_rlhf.runs.task_table import TaskTable
from pe_rlhf.system.progress import say
from reward.errors import InputError


def run_shared(plan: Plan) -> None:
    """The stages that all runs share; one that failed before is tried again, since nothing goes on without it."""
    if plan.shared is not None:
        refuse_changed([plan.shared])
        run_all([plan.shared], retry=True)


def need_shared(plan: Plan) -> None:
    """Raise `InputError` where the shared stages have not finished."""
    if plan.shared is not None and (state := state_of(plan.shared)).status != "finished":
        raise InputError(
            f"the stages that all runs share have not finished in {plan.shared.folder}"
            + (f": {state.message}" if state.message else ""),
            kind="unfinished",
            file=plan.shared.folder,
            fix="run `--only shared` first",
        )


def run_trials(plan: Plan, share: Slice, *, retry: bool) -> None:
    """This share of the trials. If an arm has a reward model of its own, it is trained before the arm's trials.

    Two shares may need the same reward model: the second one waits for it.
    """
    own = {run.folder for run in share.of([run for arm in plan.arms for run in plan.trials(arm).values()])}
    for arm in plan.arms:
        mine = [run for run in plan.trials(arm).values() if run.folder in own]
        base = plan.trial_base(arm)
        if not mine:
            continue
        if base is not None:
            refuse_changed([base])
            run_to_end(base, retry=retry)
        if base is None or state_of(base).status == "finished":
            refuse_changed(mine)
            run_all(mine, retry=retry, ending=_ending)


def run_arms(plan: Plan, share: Slice, *, retry: bool) -> None:
    """This share of the runs, at the learning rates that the trials have chosen; an arm without one is left out."""
    choices = [choose(plan, arm) for arm in plan.arms]
    for choice in choices:
        if choice.factor is None:
            say(f"{choice.arm.name}: not run, {choice.message}")
    # Shares are cut from all runs, so that they do not depend on which trials have finished.
    runs = [(c.factor, run) for c in choices for run in plan.runs(c.arm, c.factor or 1.0).values()]
    chosen = {run.folder for factor, run in runs if factor is not None}
    ready = [run for run in share.of([run for _, run in runs]) if run.folder in chosen]
    refuse_changed(ready)
    run_all(ready, retry=retry, ending=_ending)


def _ending(run: PlannedRun) -> str:
    """Reward, KL and win-rate at the end of a run; of one with tasks, their average."""
    if run.recipe.tasks:
        average = TaskTable.read(run.recipe, run.folder).average
        return f"win-rate over all tasks {average.value:.3f}" if average else ""
    ppo, final = (read_summary(RunFiles(run.folder).stage(stage)) for stage in ("ppo", "evaluate"))
    words = f"reward {ppo['reward_first']:.3f} → {ppo['reward_last']:.3f}, KL {ppo['kl_last']:.1f}" if ppo else ""
    return f"{words}, win-rate {final['win_rate']:.3f}" if final else words
