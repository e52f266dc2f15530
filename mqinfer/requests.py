"""What a coordinator asks of a request, and what it makes of its end: pure functions. No queues, no clock."""

from __future__ import annotations

from dataclasses import replace

from mqinfer.batching import Limits
from mqinfer.errors import RequestError, WireError
from mqinfer.messages import FinishReason, Request, Result
from mqinfer.plan import Plan
from mqinfer.rows import Ended
from mqinfer.settings import CoordinatorSettings
from mqinfer.tokenizer import Tokenizer
from mqinfer.wire import MAX_STEP_BYTES, encode

#: Alternatives of one token, and log-probabilities of one request in all, so that messages can carry them.
MAX_ALTERNATIVES = 20
MAX_LOGPROBS = 100_000


def limits(settings: CoordinatorSettings, plan: Plan) -> Limits:
    """How much may be in flight; a step's body stays within MAX_STEP_BYTES whatever the codec."""
    position_bytes = plan.hidden_size * 4  # float32, the widest
    return Limits(
        microbatch_rows=settings.microbatch_rows,
        rows=settings.rows,
        step_tokens=max(1, min(settings.step_tokens, MAX_STEP_BYTES // position_bytes)),
        open_trips=settings.open_trips,
    )


def refusal(request: Request, why: str) -> Result:
    """The failure of a request that can't be computed."""
    return Result(
        id=request.id,
        job=request.job,
        tag=request.tag,
        finish_reason=FinishReason.ERROR,
        prompt_tokens=len(request.prompt),
        error_code="request",
        error=why,
    )


def result_of(ended: Ended, tokenizer: Tokenizer) -> Result:
    """The answer of a row that has ended."""
    request, output = ended.row.request, ended.row.output
    return Result(
        id=request.id,
        job=request.job,
        tag=request.tag,
        finish_reason=ended.reason,
        prompt_tokens=len(request.prompt),
        output=tuple(output),
        text=tokenizer.decode(output) if ended.text is None else ended.text,
        logprobs=tuple(ended.row.logprobs),
        error_code=ended.error_code,
        error=ended.error,
    )


def check_request(request: Request, plan: Plan) -> None:
    """Raises: RequestError where computing the request under this plan can't be right."""
    if request.plan != plan.digest:
        raise RequestError(
            f"the request was made for plan {request.plan}, this pipeline runs {plan.digest}: "
            "use the plan file that the fleet was started with"
        )
    if not request.prompt:
        raise RequestError("the prompt has no tokens")
    if len(request.prompt) + 1 > plan.context_tokens:
        raise RequestError(f"the prompt has {len(request.prompt)} tokens, the model takes {plan.context_tokens}")
    if request.max_tokens < 1:
        raise RequestError("max_tokens must be at least 1")
    check_logprobs(min(request.max_tokens, plan.context_tokens), request.sampling.logprobs)
    if not all(0 <= token < plan.vocab_size for token in (*request.prompt, *request.output)):
        raise RequestError("a token id is outside the model's vocabulary")


def check_logprobs(max_tokens: int, alternatives: int) -> None:
    """Raises: RequestError where a step's end or the result could not carry them all."""
    if alternatives > MAX_ALTERNATIVES:
        raise RequestError(f"{alternatives} alternatives for each token, at most {MAX_ALTERNATIVES} are given")
    if max_tokens * (alternatives + 1) > MAX_LOGPROBS:
        raise RequestError(f"max_tokens × (alternatives + 1) is more than {MAX_LOGPROBS} log-probabilities")


def encoded(result: Result) -> bytes:
    """The result's body; where that can't be carried (it is too large), that of a failure which says so."""
    try:
        return encode(result)
    except WireError as error:
        failure = replace(
            result,
            finish_reason=FinishReason.ERROR,
            output=(),
            text="",
            logprobs=(),
            error_code="result",
            error=f"the result can't be sent: {error}",
        )
        return encode(failure)
