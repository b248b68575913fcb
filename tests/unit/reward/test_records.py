"""Preference records: every format, every reason for refusal, TRL's rule for the shared prompt, real hh-rlhf data."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.data_utils import extract_prompt

from reward.errors import InputError, Kind
from reward.records import PreferenceRecord, load_records, parse_record
from tests.failures import raises
from tests.paths import SHARED_DATA

HH_FOLDER = SHARED_DATA / "hh_rlhf"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# --- formats -------------------------------------------------------------------------------------------------------


def test_explicit_plain() -> None:
    row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert parse_record(row) == PreferenceRecord("The sky is", " blue.", " green.")


def test_explicit_chat() -> None:
    row = {"prompt": [user("Colour?")], "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]}
    assert parse_record(row) == PreferenceRecord([user("Colour?")], "Blue.", "Green.")


def test_explicit_chat_with_responses_as_text() -> None:
    row = {"prompt": [user("Colour?")], "chosen": "Blue.", "rejected": "Green."}
    assert parse_record(row) == PreferenceRecord([user("Colour?")], "Blue.", "Green.")


def test_implicit_chat_keeps_earlier_turns_in_the_prompt() -> None:
    shared = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello"), user("Colour?")]
    row = {"chosen": [*shared, assistant("Blue.")], "rejected": [*shared, assistant("Green.")]}
    assert parse_record(row) == PreferenceRecord(shared, "Blue.", "Green.")


def test_text_prompt_beside_whole_dialogues_is_ignored_as_in_trl() -> None:
    row = {
        "prompt": "Colour?",
        "chosen": [user("Colour?"), assistant("Blue.")],
        "rejected": [user("Colour?"), assistant("Green.")],
    }
    assert parse_record(row) == PreferenceRecord([user("Colour?")], "Blue.", "Green.")


def test_a_null_prompt_is_no_prompt() -> None:
    row = {"prompt": None, "chosen": "The sky is blue", "rejected": "The sky is green"}
    assert parse_record(row).prompt == "The sky is"


def test_messages_keep_role_and_content_only() -> None:
    row = {
        "prompt": [{"role": "user", "content": "Colour?", "name": None}],
        "chosen": [assistant("Blue.")],
        "rejected": [assistant("Green.")],
    }
    assert parse_record(row).prompt == [user("Colour?")]


def test_a_role_that_is_known_by_no_other_name_stays() -> None:
    chat = [{"role": "developer", "content": "Be brief."}, {"role": "Human", "content": "Colour?"}]
    row = {"prompt": chat, "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]}
    assert parse_record(row).prompt == [{"role": "developer", "content": "Be brief."}, user("Colour?")]


def test_transcript() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\nHuman: is a word here\n\nHuman: Colour?\n\nAssistant:"
    row = {"chosen": start + " Blue.", "rejected": start + "  Green.\n\nReally."}
    prompt = [user("Hi"), assistant("Hello.\nHuman: is a word here"), user("Colour?")]
    assert parse_record(row) == PreferenceRecord(prompt, "Blue.", " Green.\n\nReally.")


def test_transcript_keeps_turns_of_one_role_in_a_row() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Well.\n\nAssistant: Hello.\n\nHuman: Colour?\n\nAssistant:"
    record = parse_record({"chosen": start + " Blue.", "rejected": start + " Green."})
    assert record.prompt == [user("Hi"), assistant("Well."), assistant("Hello."), user("Colour?")]


def test_optional_columns() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2, "chosen_truncated": True, "extra": "kept out"}
    assert parse_record(row) == PreferenceRecord("p", "a", "b", 2.0, chosen_truncated=True, rejected_truncated=False)


# --- the shared prompt of two texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),
        ("Question: why?\nAnswer: so", "Question: why?\nAnswer: because"),
        ("Two spaces.  Yes", "Two spaces.  No"),
        ("Same word\nhere", "Same word there"),
        ("Line\nYes", "Line\nNo"),
    ],
)
def test_shared_prompt_is_trls_where_words_differ_from_the_first_letter(chosen: str, rejected: str) -> None:
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    record = parse_record({"chosen": chosen, "rejected": rejected})
    assert (record.prompt, record.chosen, record.rejected) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),  # TRL: "The sky is bl"
        ("Q: sure? A: yes", "Q: sure? A: yes, sure", "Q: sure? A:"),  # TRL drops the last letter of the shorter text
        ("Q: sure? A: yes ", "Q: sure? A: yes sure", "Q: sure? A:"),
        ("Q: sure?\nyes", "Q: sure?\nyeah", "Q: sure?\n"),
    ],
)
def test_shared_prompt_ends_at_a_word_boundary(chosen: str, rejected: str, prompt: str) -> None:
    record = parse_record({"chosen": chosen, "rejected": rejected})
    assert record == PreferenceRecord(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


@given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=6), st.text("ab \n", max_size=6))
def test_shared_prompt_loses_no_text_and_cuts_no_word(start: str, end_a: str, end_b: str) -> None:
    chosen, rejected = start + end_a, start + end_b
    try:
        record = parse_record({"chosen": chosen, "rejected": rejected})
    except InputError:
        return
    assert isinstance(record.prompt, str)
    assert record.prompt + record.chosen == chosen
    assert record.prompt + record.rejected == rejected
    assert record.prompt[-1].isspace() or (record.chosen[0].isspace() and record.rejected[0].isspace())
    first_words = record.chosen.split()[0], record.rejected.split()[0]
    # Longest possible: what is left of the common text is at most white space and one common first word.
    common = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    left_over = chosen[len(record.prompt) : common].split()
    assert len(left_over) <= 1
    assert all(word.startswith(rest) for rest in left_over for word in first_words)


# --- refusals --------------------------------------------------------------------------------------------------------

MESSAGES = [user("Colour?")]


@pytest.mark.parametrize(
    ("row", "kind", "key"),
    [
        ({"prompt": "p", "chosen": "a"}, "missing", "rejected"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "missing", "chosen"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "invalid", "prompt"),
        ({"prompt": "p", "chosen": 1, "rejected": "b"}, "conflict", "rejected"),
        ({"prompt": MESSAGES, "chosen": [assistant("a")], "rejected": "b"}, "conflict", "rejected"),
        ({"prompt": "p", "chosen": " \n", "rejected": "b"}, "empty", "chosen"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "empty", "rejected"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "conflict", "rejected"),
        ({"chosen": "same text", "rejected": "same text"}, "conflict", "rejected"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty", "prompt"),
        ({"prompt": [user("")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, "empty", "prompt"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "missing", "prompt"),
        ({"chosen": "Yes it is", "rejected": "No it is not"}, "missing", "prompt"),
        ({"prompt": [], "chosen": [assistant("a")], "rejected": [assistant("b")]}, "empty", "prompt"),
        ({"chosen": [], "rejected": [assistant("b")]}, "empty", "chosen"),
        ({"chosen": [*MESSAGES, {"role": "assistant"}], "rejected": [assistant("b")]}, "invalid", "chosen"),
        ({"chosen": [*MESSAGES, assistant("a")], "rejected": [user("x"), assistant("b")]}, "conflict", "rejected"),
        (
            {"chosen": [*MESSAGES, assistant("a"), assistant("more")], "rejected": [*MESSAGES, assistant("b")]},
            "conflict",
            "rejected",
        ),
        (
            {"prompt": MESSAGES, "chosen": [assistant("a"), assistant("more")], "rejected": [assistant("b")]},
            "invalid",
            "chosen",
        ),
        ({"prompt": MESSAGES, "chosen": [user("a")], "rejected": [assistant("b")]}, "invalid", "chosen"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: b"},
            "conflict",
            "rejected",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: b"},
            "conflict",
            "rejected",
        ),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}, "missing", "prompt"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "large"}, "invalid", "margin"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("nan")}, "invalid", "margin"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": True}, "invalid", "margin"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_truncated": 1}, "invalid", "chosen_truncated"),
        (["not", "a", "row"], "invalid", None),
    ],
)
def test_refusals_name_the_column(row: dict[str, object], kind: Kind, key: str | None) -> None:
    with raises(kind, key=key, row=None, file=None):
        parse_record(row)


# --- load_records ----------------------------------------------------------------------------------------------------

GOOD: dict[str, object] = {"prompt": "p", "chosen": "a", "rejected": "b"}
BAD: dict[str, object] = {"prompt": "p", "chosen": "a"}


def test_load_keeps_good_and_bad_rows_apart() -> None:
    records, bad = load_records([GOOD, GOOD, BAD, GOOD], "pairs.jsonl", max_bad_share=0.25)
    assert records == [PreferenceRecord("p", "a", "b")] * 3
    assert [(row.row, row.reason) for row in bad] == [(3, "column 'rejected' is missing")]


def test_load_refuses_a_larger_share_of_bad_rows() -> None:
    with raises("invalid", key="reward.data", file="pairs.jsonl", row=2):
        load_records([GOOD, BAD, BAD, *[GOOD] * 5], "pairs.jsonl", max_bad_share=0.24, key="reward.data")


def test_load_refuses_a_source_without_rows() -> None:
    with raises("empty", file="pairs.jsonl", row=None):
        load_records(iter([]), "pairs.jsonl")


def test_load_refuses_a_source_without_a_usable_row_whatever_the_allowed_share() -> None:
    with raises("invalid", file="pairs.jsonl", row=1):
        load_records([BAD, BAD], "pairs.jsonl", max_bad_share=1.0)


# --- real data -------------------------------------------------------------------------------------------------------


def hh_rows(name: str) -> list[dict[str, str]]:
    path = HH_FOLDER / f"{name}-base.jsonl.gz"
    if not path.exists():
        pytest.skip("needs the hh-rlhf pairs in ../shared/data, which are not here")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def is_pair(row: dict[str, str]) -> bool:
    """Whether a transcript pair is valid, from string searches only."""
    prompt_a, _, response_a = row["chosen"].rpartition("\n\nAssistant:")
    prompt_b, _, response_b = row["rejected"].rpartition("\n\nAssistant:")
    return (
        prompt_a == prompt_b
        and "\n\nHuman:" not in response_a + response_b
        and response_a.strip() != response_b.strip()
        and bool(response_a.strip())
        and bool(response_b.strip())
    )


@pytest.mark.shared
@pytest.mark.parametrize(("name", "n_valid"), [("harmless", 1794), ("helpful", 1787)])
def test_hh_rlhf_pairs(name: str, n_valid: int) -> None:
    rows = hh_rows(name)
    assert len(rows) == 1800
    records, bad = load_records(rows, name)
    assert len(records) == n_valid
    assert [row.row for row in bad] == [number for number, row in enumerate(rows, 1) if not is_pair(row)]

    speakers = {"user": "Human", "assistant": "Assistant"}
    left_out = {row.row for row in bad}
    valid_rows = [row for number, row in enumerate(rows, 1) if number not in left_out]
    for row, record in zip(valid_rows, records, strict=True):
        assert not isinstance(record.prompt, str)
        start = "".join(f"\n\n{speakers[message['role']]}: {message['content']}" for message in record.prompt)
        assert f"{start}\n\nAssistant: {record.chosen}" == row["chosen"]
        assert f"{start}\n\nAssistant: {record.rejected}" == row["rejected"]
        assert record.prompt[0]["role"] == "user"


@pytest.mark.shared
def test_hh_rlhf_reasons() -> None:
    """The 19 bad pairs by reason, and single rows looked up by eye."""
    _, harmless = load_records(hh_rows("harmless"), "harmless")
    _, helpful = load_records(hh_rows("helpful"), "helpful")
    reasons = [row.reason for row in harmless + helpful]
    assert sum("response is empty" in reason for reason in reasons) == 7
    assert sum("the same up to one final" in reason for reason in reasons) == 11
    assert sum("are equal" in reason for reason in reasons) == 1
    assert {row.row: row.reason for row in helpful}[722].endswith("are equal")
    assert {row.row: row.reason for row in helpful}[741] == "the rejected response is empty"
    assert {row.row for row in harmless} == {87, 517, 926, 1104, 1255, 1689}
