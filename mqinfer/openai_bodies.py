"""The OpenAI request bodies that a batch line may carry, and the response bodies that answer them.

Shapes only: what is allowed, what it means as a `Request`, what a `Result` looks like. No files, no queues.
https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mqinfer.errors import RequestError
from mqinfer.messages import FinishReason, Result, Sampling, TokenLogprob

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
#: Token id -> its text, or None where no tokenizer is at hand.
TokenText = Callable[[int], str]


class Body(BaseModel):
    """What both kinds share. Fields of OpenAI's API that are not here are refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    user: str | None = None
    ignore_eos: bool = False

    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were written."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def limit(self) -> int | None:
        """Tokens to generate at most, where the body says so."""
        return self.max_tokens

    def alternatives(self) -> int:
        """As in `Sampling.logprobs`."""
        return -1


class TextPart(BaseModel):
    """A piece of a message's content; only text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(Body):
    """The body of a chat completion."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else -1


class CompletionBody(Body):
    """The body of a completion; `prompt` is a text or token ids."""

    prompt: str | Annotated[list[int], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def alternatives(self) -> int:
        return -1 if self.logprobs is None else self.logprobs


def parse_body(url: str, body: Any) -> ChatBody | CompletionBody:
    """Raises: RequestError that names the field at fault."""
    kinds: Mapping[str, type[ChatBody | CompletionBody]] = {CHAT: ChatBody, COMPLETIONS: CompletionBody}
    if url not in kinds:
        raise RequestError(f"url {url!r} is not served here, only {CHAT} and {COMPLETIONS}")
    try:
        return kinds[url].model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "body"
        words = "is not supported here" if first["type"] == "extra_forbidden" else first["msg"]
        raise RequestError(f"field {field}: {words}") from None


def sampling(body: Body, *, temperature: float, name: str) -> Sampling:
    """How to draw, with `temperature` where the body gives none and a seed made of `name` likewise."""
    seed = body.seed
    if seed is None:
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    return Sampling(
        temperature=temperature if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=seed & (2**63 - 1),
        logprobs=body.alternatives(),
    )


def response_body(result: Result, *, url: str, model: str, token_text: TokenText) -> dict[str, Any]:
    """The response to a request that was answered."""
    chat = url == CHAT
    choice: dict[str, Any] = {"index": 0, "finish_reason": result.finish_reason.value}
    if chat:
        choice["message"] = {"role": "assistant", "content": result.text}
        choice["logprobs"] = _chat_logprobs(result.logprobs, token_text)
    else:
        choice["text"] = result.text
        choice["logprobs"] = _completion_logprobs(result.logprobs, token_text)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{result.id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": len(result.output),
            "total_tokens": result.prompt_tokens + len(result.output),
        },
    }


def batch_row(
    *, row_id: str, custom_id: str | None, body: dict[str, Any] | None, error: dict[str, Any] | None
) -> bytes:
    """One line of a batch's output file, its newline included."""
    response = None if body is None else {"status_code": 200, "request_id": row_id, "body": body}
    row = {"id": f"batch_req_{row_id}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def failed(result: Result) -> bool:
    """Whether the result is a failure row."""
    return result.finish_reason is FinishReason.ERROR


def _chat_logprobs(logprobs: Sequence[TokenLogprob], text: TokenText) -> dict[str, Any] | None:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": text(token), "logprob": logprob, "bytes": list(text(token).encode())}

    if not logprobs:
        return None
    return {
        "content": [
            {**entry(item.token, item.logprob), "top_logprobs": [entry(token, value) for token, value in item.top]}
            for item in logprobs
        ]
    }


def _completion_logprobs(logprobs: Sequence[TokenLogprob], text: TokenText) -> dict[str, Any] | None:
    if not logprobs:
        return None
    tokens = [text(item.token) for item in logprobs]
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [item.logprob for item in logprobs],
        "top_logprobs": [{text(token): value for token, value in item.top} for item in logprobs],
        "text_offset": offsets[:-1],
    }
