"""What a coordinator asks of a request, and what it makes of its end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fakes import FakeTokenizer, make_plan

from mqinfer.errors import RequestError
from mqinfer.messages import FinishReason, Request, Sampling, TokenLogprob
from mqinfer.requests import check_request, encoded, limits, refusal, result_of
from mqinfer.rows import Ended, LiveRow
from mqinfer.settings import CoordinatorSettings, load
from mqinfer.wire import MAX_STEP_BYTES, decode

PLAN = make_plan("p", context_tokens=20)
REQUEST = Request(id="r", job="j", tag="t", plan=PLAN.digest, prompt=(5, 6, 7), max_tokens=4)
TOKENIZER: Any = FakeTokenizer()


def test_a_request_that_can_be_computed_passes() -> None:
    check_request(REQUEST, PLAN)
    check_request(replace(REQUEST, output=(8, 9)), PLAN)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan": "0" * 16}, "plan"),
        ({"prompt": ()}, "no tokens"),
        ({"prompt": (5,) * 20}, "20 tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"sampling": Sampling(logprobs=49_152)}, "alternatives"),
        ({"prompt": (5, -1)}, "vocabulary"),
        ({"output": (PLAN.vocab_size,)}, "vocabulary"),
    ],
)
def test_a_request_that_can_not_be_computed_is_told_why(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        check_request(replace(REQUEST, **changes), PLAN)


def test_a_step_never_passes_the_bound_on_bodies() -> None:
    settings = load(CoordinatorSettings, step_tokens=10**6)
    wide = replace(PLAN, hidden_size=8192)
    assert limits(settings, wide).step_tokens * 8192 * 4 <= MAX_STEP_BYTES
    assert limits(settings, replace(PLAN, hidden_size=2**24)).step_tokens == 1


def ended(**more: Any) -> Ended:
    row = LiveRow(number=0, request=REQUEST, output=[8, 9], logprobs=[])
    return Ended(**({"row": row, "reason": FinishReason.LENGTH} | more))


def test_a_result_has_the_text_of_its_tokens_unless_a_stop_string_cut_it() -> None:
    result = result_of(ended(), TOKENIZER)
    assert (result.text, result.output, result.prompt_tokens) == (TOKENIZER.decode([8, 9]), (8, 9), 3)
    assert result_of(ended(text="cut"), TOKENIZER).text == "cut"


def test_a_refusal_carries_the_reason_and_the_tag() -> None:
    result = refusal(REQUEST, "because")
    assert (result.tag, result.error, result.finish_reason) == ("t", "because", FinishReason.ERROR)


def test_a_result_that_no_message_can_carry_becomes_a_failure_that_says_so() -> None:
    tops = tuple((token, -1.0) for token in range(20))
    row = LiveRow(number=0, request=REQUEST, output=[8], logprobs=[])
    row.logprobs += [TokenLogprob(token=8, logprob=-1.0, top=tops)] * 30_000
    result = decode(encoded(result_of(Ended(row, FinishReason.LENGTH), TOKENIZER)))
    assert result.finish_reason is FinishReason.ERROR
    assert "can't be sent" in result.error
