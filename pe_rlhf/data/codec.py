"""Text to token ids and back: the one place that knows the chat template.

A prompt is rendered through the chat template where there is one. A response is tokenised as it follows its prompt, and
ends with the token that the template writes after an assistant's message, so a response means the same tokens whether
it was sampled, labelled or trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pe_rlhf.data.cuts import Cuts
from pe_rlhf.types import Rollout
from reward.errors import InputError
from reward.judges.user_code import call_users_code
from reward.records import Message, Prompt

TRANSCRIPT_NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}
_DATE: ContextVar[str | None] = ContextVar("date", default=None)
# Takes the place of a special token that stands in a message, until the template has been rendered around it.
MARK = re.compile("\ue000(\\d+)\ue001")


class TextCodec:
    """Encodes prompts and responses for one tokenizer.

    `chat_template` is the recipe's key: `auto`, `none`, a Jinja template, or the path of one. `eos_token_ids` are those
    that end what the model samples; `end_token_id` is the one of them that ends a labelled response. `arguments` go to
    the template, such as `enable_thinking`; `date` is the day that it prints as today's, else that of `dated` here.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str = "auto",
        eos_token_ids: Sequence[int] = (),
        arguments: Mapping[str, Any] | None = None,
        date: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.template = find_template(tokenizer, chat_template)
        self._arguments = {"strftime_now": template_clock(date), **(arguments or {})}
        own = tokenizer.eos_token_id
        ends = [*([own] if isinstance(own, int) else []), *eos_token_ids]
        self._end_ids = frozenset(ends)
        added = tokenizer.added_tokens_decoder
        self._end_texts = [added[i].content for i in sorted(self._end_ids) if i in added]
        self._special = sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
        self._find_special = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        line_break: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
        self._line_break = line_break if tokenizer.decode(line_break) == "\n" else []
        self._as_parts = False  # content as a list, which the templates of some models with pictures go over
        self._lead, written = "", None
        if self.template is not None:
            call_users_code("chat_template", self._check_template)
            self._lead, written = self._around_a_response()
        self.end_token_id = written if written is not None else ends[0] if ends else None

    @property
    def day(self) -> str | None:
        """The day that the template prints as today's; None where it prints none."""
        prints = self.template is not None and "strftime_now" in self.template
        return self._arguments["strftime_now"]("%Y-%m-%d") if prints else None

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def render(self, prompt: Prompt) -> str:
        """The text that the model is given for a prompt. Raises `InputError` where the chat template fails on it."""
        return MARK.sub(lambda mark: self._special[int(mark[1])], self._rendered(prompt))

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; special tokens come from the template, or from the tokenizer where there is none.

        What looks like a special token in a message is text. A prompt that is plain text without a template may hold
        special tokens: somebody has rendered it.
        """
        return self._ids(self._rendered(prompt))

    def check(self, prompt: Prompt) -> None:
        """Raise `InputError` where the template fails on a prompt, or on the conversation that it starts."""
        self._rendered(prompt)
        if self.template is not None:
            self._answered(prompt, "Yes.")

    # ---- responses ---------------------------------------------------------------------------------------------------

    def encode_pair(self, prompt: Prompt, response: str, truncated: bool = False) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of a response to it; the end token ends the response unless it was cut."""
        ids, responses = self.encode_responses(prompt, [(response, truncated)])
        return ids, responses[0]

    def encode_responses(
        self, prompt: Prompt, responses: Sequence[tuple[str, bool]]
    ) -> tuple[list[int], list[list[int]]]:
        """Token ids of a prompt and of several responses to it, each a text and whether it was cut."""
        text = self._rendered(prompt)
        ids = self._ids(text)
        plain = self.template is None and isinstance(prompt, str)
        lead = self._lead if self.template is not None else "" if plain else " "
        encoded: list[list[int]] = []
        for response, truncated in responses:
            said = self._marked(self._without_end(response))
            # In a transcript, and in some templates, white space comes first; what was sampled may have it already.
            found = self._continued(text, ids, lead + said.removeprefix(lead))
            ends = [] if truncated or self.end_token_id is None else [self.end_token_id]
            encoded.append(found + ends)
        return ids, encoded

    def encode_within(
        self, prompt: Prompt, responses: Sequence[tuple[str, bool]], limit: int, cuts: Cuts | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """As `encode_responses`, but the prompt with each of them is at most `limit` tokens.

        The end of a response that is too long is left out. Of the prompt it is the middle, the same for all responses:
        BOS and the system's turn stay, and so does what stands last. `cuts` counts what lost something.
        """
        ids, whole = self.encode_responses(prompt, responses)
        encoded = [response[: limit - 1] for response in whole]
        room = limit - max(map(len, encoded))
        (cuts or Cuts()).count(len(ids) > room, encoded != whole)
        if len(ids) <= room:
            return ids, encoded
        kept = self._opening(prompt, ids)
        if kept >= room:  # the system's turn is longer than that
            kept = int(room > 1 and ids[0] == self.tokenizer.bos_token_id)
        return ids[:kept] + ids[len(ids) - room + kept :], encoded

    def encode_conversations(
        self, prompt: Prompt, responses: Sequence[tuple[str, bool]], limit: int
    ) -> list[list[int]]:
        """Token ids of whole conversations of at most `limit` tokens, each as the template writes it to its very end.

        A response that was cut has no end. Without a template it is a prompt and a response as anywhere else. What is
        too long is cut as in `encode_within`.
        """
        ids, rows = self.encode_responses(prompt, responses)
        rows = [ids + row for row in rows]
        for i, (response, truncated) in enumerate(responses):
            if self.template is not None and not truncated:
                rows[i] = self._ids(self._answered(prompt, response))
        over = max(map(len, rows)) - limit
        if over > 0:
            shared = min(_common_start(row, ids) for row in rows)
            kept = min(self._opening(prompt, ids), shared)
            gone = min(over, shared - kept)
            rows = [(row[:kept] + row[kept + gone :])[:limit] for row in rows]
        return rows

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a whole text with the tokenizer's special tokens, and the end token unless one ends it."""
        if self._without_end(text) != text:
            text = text.rstrip()
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if self.end_token_id is None or (ids and ids[-1] in self._end_ids):
            return ids
        return [*ids, self.end_token_id]

    def decode(self, ids: list[int]) -> str:
        """The text of a response, without special tokens; a space that it starts with is kept."""
        # Some tokenizers drop the first space of what they decode: a line break stands before it here.
        text = self._decoded([*self._line_break, *ids])
        return text[1:] if self._line_break and text.startswith("\n") else self._decoded(ids)

    def texts(self, rollout: Rollout) -> list[str]:
        """The texts of a rollout's responses; one that a stop string ended ends before it."""
        found: list[str] = []
        for ids, reason in zip(rollout.responses, rollout.finish, strict=True):
            text = self.decode(ids)
            ends = [place for stop in rollout.stop if reason == "stop" and (place := text.find(stop)) >= 0]
            found.append(text[: min(ends, default=len(text))])
        return found

    def written(self, ids: list[int]) -> str:
        """A whole row as the model reads it, special tokens included."""
        return str(self.tokenizer.decode(ids))

    # ---- details -----------------------------------------------------------------------------------------------------

    def _rendered(self, prompt: Prompt, *, answered: bool = False) -> str:
        """As `render`, with marks for special tokens in messages; `answered`: the last message is the response."""
        if self.template is None and isinstance(prompt, str):
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        marked = [self._marked_message(message) for message in messages]
        if self.template is None:
            return transcript(marked)
        try:
            text = self.tokenizer.apply_chat_template(
                marked,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=not answered,
                **self._arguments,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            start, said = repr(messages[0]["content"])[:60], str(error) or type(error).__name__
            message = f"chat_template: it fails on the prompt that starts with {start}: {said}"
            raise InputError(message, kind="user_code", key="chat_template") from error
        return str(text)

    def _answered(self, prompt: Prompt, response: str) -> str:
        """The whole conversation, rendered by the template."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._rendered([*messages, {"role": "assistant", "content": response}], answered=True)

    def _check_template(self) -> None:
        """Raise `InputError` for a template that writes the same for every prompt, as text and in parts."""
        written = set[str]()
        for self._as_parts in (False, True):
            with suppress(InputError):  # it may want more than one message: real prompts will tell
                written = {self._rendered(f"question {word}") for word in ("one", "two")}
            if len(written) > 1:
                return
        self._as_parts = False
        if written:
            message = f"chat_template: it shows nothing of a prompt, it always writes {written.pop()[:60]!r}"
            raise InputError(message, kind="invalid", key="chat_template")

    def _opening(self, prompt: Prompt, ids: list[int]) -> int:
        """How many of a prompt's ids stand before its first message that is no system's: BOS and the system's turn."""
        first, other = 0, "\ufffd"
        if not isinstance(prompt, str):
            first = next((i for i, message in enumerate(prompt) if message["role"] != "system"), len(prompt) - 1)
        changed: Prompt = other if isinstance(prompt, str) else [*prompt[:first], {**prompt[first], "content": other}]
        return _common_start(ids, self.encode_prompt(changed))

    def _around_a_response(self) -> tuple[str, int | None]:
        """The white space that the template writes before an assistant's message, and the end token that it writes
        after it; None where it writes none that ends what the model samples."""
        question, answer = [{"role": "user", "content": "Hi"}], "Good morning"
        try:
            before = self._rendered(question)
            whole = self._rendered([*question, {"role": "assistant", "content": answer}], answered=True)
        except InputError:  # it has its reasons, and says them for the prompts of the run
            return "", None
        start = whole.rfind(answer)
        if start < 0:
            return "", None
        lead = "" if (found := whole[:start].removeprefix(before)).strip() else found
        for token in self.tokenizer(whole[start + len(answer) :], add_special_tokens=False)["input_ids"]:
            if token in self._end_ids:
                return lead, token
            if str(self.tokenizer.decode([token])).strip():
                break
        return lead, None

    def _marked_message(self, message: Message) -> dict[str, Any]:
        said = message["content"]
        text = self._marked(self._without_end(said) if message["role"] == "assistant" else said)
        return {**message, "content": [{"type": "text", "text": text}] if self._as_parts else text}

    def _marked(self, content: str) -> str:
        """The content with marks in place of what the tokenizer would take for special tokens."""
        return self._find_special.sub(lambda found: f"\ue000{self._special.index(found[0])}\ue001", content)

    def _without_end(self, response: str) -> str:
        """Data may hold the end token as text, which the codec writes itself."""
        while (end := next((end for end in self._end_texts if response.rstrip().endswith(end)), None)) is not None:
            response = response.rstrip().removesuffix(end)
        return response

    def _ids(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of a text; a marked special token in it is text."""
        add = self.template is None if add_special_tokens is None else add_special_tokens
        first, *others = MARK.split(text)  # text, number, text, number, …
        ids: list[int] = self.tokenizer(first, add_special_tokens=add)["input_ids"]
        for number, after in zip(others[::2], others[1::2], strict=True):
            word = self._special[int(number)]
            ids += self.tokenizer(word, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids += self.tokenizer(after, add_special_tokens=False)["input_ids"]
        return ids

    def _continued(self, text: str, ids: list[int], response: str) -> list[int]:
        """Token ids of a response as it follows the text whose ids are given, so that a tokenizer that sets a space
        before every text sets none here. Where a token would reach over the border it starts afresh."""
        whole = self._ids(text + response)
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        afresh = self._ids("\n" + response, add_special_tokens=False)
        if self._line_break and afresh[: len(self._line_break)] == self._line_break:
            return afresh[len(self._line_break) :]
        return self._ids(response, add_special_tokens=False)

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@contextmanager
def dated(date: str | None) -> Iterator[None]:
    """Within the block templates print this day, year-month-day, as today's, so that a prompt is the same tomorrow."""
    token = _DATE.set(date or _DATE.get())
    try:
        yield
    finally:
        _DATE.reset(token)


def template_clock(date: str | None = None) -> Callable[[str], str]:
    """What templates know as `strftime_now`: it stands still at that day, else at that of `dated`, else now."""
    day = date or _DATE.get()
    return (datetime.now() if day is None else datetime.fromisoformat(day)).strftime


def _common_start(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def transcript(messages: list[Message]) -> str:
    """A dialogue as plain text for a model without a chat template, in the form of Anthropic's hh-rlhf."""
    turns = [f"\n\n{TRANSCRIPT_NAMES.get(m['role'], m['role'])}: {m['content']}" for m in messages]
    return "".join(turns) + "\n\nAssistant:"


def find_template(tokenizer: PreTrainedTokenizerBase, setting: str) -> str | None:
    """The Jinja template that a recipe's `chat_template` names; None for plain text."""
    if setting == "none":
        return None
    if setting == "auto":
        template: Any = tokenizer.chat_template
        if isinstance(template, dict):  # several by name
            if "default" not in template:
                message = f"chat_template: auto: the tokenizer has {', '.join(template)}, and none is the default"
                raise InputError(message, kind="conflict", key="chat_template", fix="give the template's file instead")
            template = template["default"]
        return template if isinstance(template, str) else None
    return read_template(setting)


def read_template(setting: str) -> str:
    """A Jinja template, or the text of the file that holds one. Raises `InputError` for anything else."""
    if "{" in setting:
        return setting
    path = Path(setting)
    if not path.is_file():
        message = f"chat_template: {setting!r} is neither auto, none, a Jinja template nor the path of one"
        raise InputError(message, kind="missing", key="chat_template", file=path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"chat_template: {path} cannot be read: {error}"
        raise InputError(message, kind="unreadable", key="chat_template", file=path) from error
