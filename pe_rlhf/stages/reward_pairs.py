"""The preference pairs of the reward stage: read, tokenised, and some of them held out by prompt."""

from __future__ import annotations

from typing import Any

from pe_rlhf.config import DataSource, RewardConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.preference_pairs import Pairs, PairTokens, encode_pair
from pe_rlhf.data.rows import hold_out, load_preferences, note_bad_rows, say_first, say_overlap
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.runs.layout import RunFiles, StageFiles
from pe_rlhf.stages.context import StageContext
from reward.errors import InputError
from reward.records import PreferenceRecord, first_turn

Encoded = tuple[PreferenceRecord, PairTokens]


def load_pairs(context: StageContext[Any], config: RewardConfig, backbone: Backbone) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs, tokenised. Raises `InputError` where one of them is left without pairs."""
    source = config.data or DataSource(path=str(RunFiles(context.run_dir).stage("preferences").preferences))
    codec, pad = context.codec(backbone), backbone.pad_token_id
    limit = min(config.max_length, backbone.longest_sequence)

    def encoded(source: DataSource, key: str) -> list[Encoded]:
        return _records(context.files, source, key, config, codec, limit)

    records = encoded(source, "reward.data")
    if config.eval_data is not None:
        train, held_out = records, encoded(config.eval_data, "reward.eval_data")
        say_overlap("reward.eval_data", [_turn(pair) for pair in held_out], [_turn(pair) for pair in train])
    else:
        train, held_out = hold_out(records, _turn, config.eval_share, context.recipe.seed, "reward held out")
    if not train or not held_out:
        raise InputError(
            f"reward.data: {len(records)} pairs are too few to hold out a share of {config.eval_share}",
            kind="empty",
            key="reward.data",
            file=source.title,
            fix="give it more pairs, or name held-out ones in reward.eval_data",
        )
    return Pairs([tokens for _, tokens in train], pad), Pairs([tokens for _, tokens in held_out], pad)


def _records(
    files: StageFiles, source: DataSource, key: str, config: RewardConfig, codec: TextCodec, limit: int
) -> list[Encoded]:
    """The usable records of a data set with their tokens; a row that cannot be encoded is an unusable one."""
    layout, rows, bad = load_preferences(source, key, config.max_bad_share, lambda r: (r, encode_pair(r, codec, limit)))
    note_bad_rows(files.left_out(key), key, bad)
    first = rows[0][1]
    say_first(key, len(rows), f"pairs, {layout}", codec.written(first.prompt + first.chosen))
    return rows


def _turn(pair: Encoded) -> str:
    return first_turn(pair[0].prompt)
