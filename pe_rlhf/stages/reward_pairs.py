"""The preference pairs of the reward stage: read, tokenised, and some of them held out by prompt."""

from __future__ import annotations

from array import array
from operator import itemgetter
from typing import Any

from pe_rlhf.config import DataSource, RewardConfig
from pe_rlhf.data.cuts import Cuts
from pe_rlhf.data.preference_pairs import Pairs, PairTable, encode_pair
from pe_rlhf.data.rows import hold_out, load_preferences, note_bad_rows, say_first, say_overlap
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.stages.context import StageContext
from pe_rlhf.system.seeding import permutation
from reward.errors import InputError
from reward.records import PreferenceRecord, first_turn

Encoded = tuple[str, int]  # the first turn of a pair's prompt, and its number in the table


def load_pairs(context: StageContext[Any], config: RewardConfig, backbone: Backbone) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs, tokenised. Raises `InputError` where one of them is left without pairs."""
    source = config.data or DataSource(path=str(RunFiles(context.run_dir).stage("preferences").preferences))
    codec, pad = context.codec(backbone), backbone.pad_token_id
    limit = min(config.max_length, backbone.longest_sequence)

    table = PairTable()

    def encoded(source: DataSource, key: str) -> list[Encoded]:
        cuts = Cuts()

        def encode(record: PreferenceRecord) -> Encoded:
            return first_turn(record.prompt), table.append(encode_pair(record, codec, limit, cuts))

        layout, rows, bad = load_preferences(source, key, config.max_bad_share, encode)
        note_bad_rows(context.files.left_out(key), key, bad)
        first = table[rows[0][1]]
        say_first(key, len(rows), f"pairs, {layout}", codec.written(first.prompt + first.chosen))
        cuts.say(key, len(rows) + len(bad), limit)
        return rows

    records = encoded(source, "reward.data")
    if config.eval_data is not None:
        train, held_out = records, encoded(config.eval_data, "reward.eval_data")
        say_overlap("reward.eval_data", [turn for turn, _ in held_out], [turn for turn, _ in train])
    else:
        train, held_out = hold_out(records, itemgetter(0), config.eval_share, context.recipe.seed, "reward held out")
    if config.max_pairs is not None:  # the first of one order: fewer pairs are some of more
        order = permutation(len(train), context.recipe.seed, "reward max pairs")
        train = [train[number] for number in order[: config.max_pairs]]
    if not train or not held_out:
        raise InputError(
            f"reward.data: {len(records)} pairs are too few to hold out a share of {config.eval_share}",
            kind="empty",
            key="reward.data",
            file=source.title,
            fix="give it more pairs, or name held-out ones in reward.eval_data",
        )
    train_numbers, held_out_numbers = (array("q", (number for _, number in side)) for side in (train, held_out))
    return Pairs(table.take(train_numbers), pad), Pairs(table.take(held_out_numbers), pad)
