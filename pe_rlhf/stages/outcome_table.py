"""The table a run ends with."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def outcome_table(name: str, summaries: dict[str, dict[str, Any]]) -> Table:
    """What the stages came to: accuracy, scores before and after, KL, win-rate; a row only for what is known."""
    table = Table(title=f"pe-rlhf: {name}", title_justify="left")
    table.add_column("result")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("95 % interval, n", justify="right")
    sft, reward, ppo, final = (summaries.get(stage) for stage in ("sft", "reward", "ppo", "evaluate"))
    if sft:
        losses = (sft["eval_loss_before"], sft["eval_loss"])
        table.add_row(
            "sft, held-out loss (nats per token)", f"{losses[0]:.3f}", f"{losses[1]:.3f}", f"{sft['eval_rows']} rows"
        )
    if reward:
        interval = (
            f"{reward['eval_accuracy_low']:.3f} – {reward['eval_accuracy_high']:.3f}, {reward['eval_pairs']} pairs"
        )
        table.add_row("reward model, held-out accuracy", "", f"{reward['eval_accuracy']:.3f}", interval)
    if ppo:
        table.add_row("reward while training", f"{ppo['reward_first']:.3f}", f"{ppo['reward_last']:.3f}", "")
        table.add_row("KL while training (nats per response)", "0.00", f"{ppo['kl_last']:.2f}", "")
        table.add_row("seconds per PPO step", "", f"{ppo['seconds_per_step']:.1f}", f"{ppo['steps']} steps")
    if final:
        if final["gold_policy"] is not None:
            table.add_row(
                "gold score, held-out prompts", f"{final['gold_anchor']:.3f}", f"{final['gold_policy']:.3f}", ""
            )
        table.add_row("reward, held-out prompts", f"{final['reward_anchor']:.3f}", f"{final['reward_policy']:.3f}", "")
        table.add_row("KL, held-out prompts", "0.00", f"{final['kl']:.2f}", "")
        lengths = (final["mean_length_anchor"], final["mean_length_policy"])
        table.add_row("response length (tokens)", f"{lengths[0]:.1f}", f"{lengths[1]:.1f}", "")
        interval = f"{final['ci_low']:.3f} – {final['ci_high']:.3f}, {final['n']} ({final['ties']} ties)"
        table.add_row("win-rate against the anchor", "0.500", f"{final['win_rate']:.3f}", interval)
    peaks = [summary["peak_rss_mib"] for summary in summaries.values() if "peak_rss_mib" in summary]
    seconds = sum(summary.get("seconds", 0) for summary in summaries.values())
    if peaks:
        table.add_row("peak memory (MiB), time (s)", f"{max(peaks):.0f}", f"{seconds:.0f}", "")
    return table
