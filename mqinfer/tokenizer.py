"""Text to token ids and back, the model's own chat template, stop strings: the tokenizer side of transformers.

transformers is imported when a tokenizer is loaded, not before. No torch may be imported here: producers and
coordinators run where there is none.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mqinfer.errors import PlanError, RequestError

#: Tokens that `find_stop` decodes at first; most stop strings are seen in these.
_TAIL_TOKENS = 8
#: Characters at the ends of a decoded tail that may differ from the whole text: a character that is cut there
#: (its bytes become at most three replacement characters each) and a leading space that decoders strip.
_BLURRED_CHARS = 8


def hide_torch() -> None:
    """From now on this process has no torch, even where it is installed: for actors that never compute.

    transformers imports torch where it finds it. Loading SmolLM2's tokenizer takes 1.1 s and 100 MiB without it,
    3.3 s and 361 MiB with it. Nothing is hidden where torch is imported already.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # what the import system itself means by "absent"
    logging.getLogger("transformers").addFilter(_is_not_about_torch)


class Tokenizer:
    """A model's tokenizer. Threads may share it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        # Lengths are checked against the plan's context; transformers would log a warning of its own.
        inner.model_max_length = sys.maxsize
        #: A decoder may strip the space of a text's first token, so tokens are decoded behind this one.
        self._anchor = inner.encode("a", add_special_tokens=False)[-1:]

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of the checkpoint in the folder. Raises: PlanError."""
        try:
            from transformers import AutoTokenizer

            return cls(AutoTokenizer.from_pretrained(folder, local_files_only=True))
        except Exception as error:  # the tokenizers library raises plain Exception
            raise PlanError(f"{folder} has no tokenizer that can be read: {_one_line(error)}") from error

    @property
    def eos_tokens(self) -> tuple[int, ...]:
        """The tokenizer's own end-of-sequence token, if it has one; a model may have more (`Plan.eos_tokens`)."""
        token = self._inner.eos_token_id
        return () if token is None else (token,)

    def encode(self, text: str) -> list[int]:
        """The text's tokens, with what the model puts before every text (such as BOS). Raises: RequestError."""
        return list(self._inner.encode(_valid(text)))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation that the model is to answer, by the model's own chat template.

        Raises: RequestError where the model has no template, or the template refuses the messages.
        """
        if not self._inner.chat_template:
            raise RequestError("the model has no chat template: send a prompt instead of messages")
        _check_messages(messages)
        from jinja2 import TemplateError

        try:
            tokens = self._inner.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=False
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RequestError(f"the model's chat template refuses the messages: {_one_line(error)}") from error
        return list(tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """The tokens' text, without special tokens."""
        return str(self._inner.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def decode_token(self, token: int) -> str:
        """One token's text as it stands inside a longer text, special tokens included.

        A piece of a character that several tokens share becomes U+FFFD.
        """
        before, both = (
            str(self._inner.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for tokens in (self._anchor, [*self._anchor, token])
        )
        return both[len(before) :]


def find_stop(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str]) -> str | None:
    """The text of all tokens cut before the first stop string, where the newest token ended one; else None.

    To be called after every new token. Decodes the last few tokens only, until a stop string is seen in them.
    """
    longest = max(map(len, stops), default=0)
    if not longest or not tokens or not _has_any(_tail(tokenizer, tokens, longest), stops):
        return None
    text = tokenizer.decode(tokens)
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else None


def _tail(tokenizer: Tokenizer, tokens: Sequence[int], longest: int) -> str:
    """The end of the text, long enough to hold any stop string that ends inside the newest token."""
    count = _TAIL_TOKENS
    while count < len(tokens):
        # A stop string that the newest token ends begins at most `longest` characters before that token's text.
        if len(tokenizer.decode(tokens[-count:-1])) >= longest + _BLURRED_CHARS:
            break
        count *= 2
    return tokenizer.decode(tokens[-count:])


def _has_any(text: str, stops: Sequence[str]) -> bool:
    return any(stop and stop in text for stop in stops)


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if not messages:
        raise RequestError("messages: there is none")
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RequestError(f"messages.{index}.{key}: missing or not a text")
            _valid(message[key])


def _valid(text: str) -> str:
    """The text itself. Raises: RequestError for half a surrogate pair, which JSON can carry and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError("the text has half of a surrogate pair, which is no character") from error
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_not_about_torch(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")
