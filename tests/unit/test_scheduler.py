"""The coordinator's mind on its own: a ring of made-up workers whose "model" is a hash of the row's tokens."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from mqinfer.batching import LONG_FIRST_TRIP_S, Limits
from mqinfer.messages import FinishReason, Miss, MissReason, Request, Sampled, Sampling, Step, StepDone, StepTaken
from mqinfer.plan import Plan, StageSpec
from mqinfer.scheduler import Decision, Ended, Forget, Replayed, Scheduler, Send
from mqinfer.verdicts import MAX_FAILURES

EOS = 7
PLAN = Plan(
    name="test",
    model="none",
    dtype="float32",
    stages=(StageSpec(first=0, end=1), StageSpec(first=1, end=2)),
    fingerprint="0" * 64,
    model_type="llama",
    hidden_size=8,
    vocab_size=100,
    context_tokens=64,
    eos_tokens=(EOS,),
)
LIMITS = Limits(microbatch_rows=4, rows=16, step_tokens=8, open_trips=100)
ROUTE = ("w0", "w1")


def next_token(tokens: Sequence[int]) -> int:
    """The made-up model: never EOS."""
    return 10 + hashlib.sha256(repr(tuple(tokens)).encode()).digest()[0] % 90


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def request(name: str, prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 5, **more: object) -> Request:
    fields = {"id": name, "job": "job", "plan": PLAN.digest, "prompt": tuple(prompt), "max_tokens": max_tokens}
    return Request(**(fields | more))  # type: ignore[arg-type]


class Ring:
    """Answers steps as workers with caches would, and checks that every step is consistent with the cache."""

    def __init__(self) -> None:
        self.cache: dict[tuple[int, int], list[int]] = {}
        self.scheduler = Scheduler(PLAN, "owner", LIMITS, lambda output, stops: None, step_timeout_s=10.0)
        self.results: dict[str, Ended] = {}
        self.replayed: list[Replayed] = []
        self.sent: list[Send] = []
        #: A microbatch's number -> which route it has drawn.
        self.routes: Callable[[int], tuple[str, ...]] = lambda microbatch: ROUTE

    def take(self, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Send():
                    self.sent.append(decision)
                case Ended():
                    assert decision.row.request.id not in self.results
                    self.results[decision.row.request.id] = decision
                case Forget():
                    self.forget(decision.release.rows)
                case Replayed():
                    self.replayed.append(decision)
                    decision.row.kept_failures = decision.row.failures
        if any(isinstance(decision, Replayed) for decision in decisions):
            self.take(self.scheduler.form(0.0))

    def forget(self, rows: Sequence[tuple[int, int]]) -> None:
        for row in rows:
            self.cache.pop(row, None)

    def add(self, *requests: Request) -> None:
        for item in requests:
            self.take(self.scheduler.add(item)[1])
        self.take(self.scheduler.form(0.0))

    def answer(self, step: Step) -> StepDone:
        self.forget(step.release)
        tokens, sampled = list(step.tokens), []
        for row in step.rows:
            held = self.cache.setdefault((row.row, row.epoch), [])
            assert len(held) == row.start, "a step must begin where the cache ends"
            held += [tokens.pop(0) for _ in range(row.count)]
            if row.sampling is not None:
                sampled.append(Sampled(row=row.row, epoch=row.epoch, token=next_token(held)))
        assert not tokens
        return StepDone(
            plan=step.plan,
            microbatch=step.microbatch,
            number=step.number,
            route=self.routes(step.microbatch),
            sampled=tuple(sampled),
        )

    def turn(self) -> None:
        self.take(self.scheduler.done(self.answer(self.sent.pop(0).step), 0.0))

    def until(self, ended: int) -> None:
        while len(self.results) < ended:
            self.turn()

    def run(self) -> None:
        for _ in range(10_000):
            if not self.sent:
                return
            self.turn()
        raise AssertionError("the ring never rests")


def taken(step: Step, worker: str, *, passed: bool = False) -> StepTaken:
    return StepTaken(plan=step.plan, microbatch=step.microbatch, number=step.number, worker=worker, passed=passed)


def missed(step: Step, reason: MissReason, *rows: int) -> StepDone:
    misses = tuple(
        Miss(row=row.row, epoch=row.epoch, stage=1, reason=reason) for row in step.rows if not rows or row.row in rows
    )
    return StepDone(plan=step.plan, microbatch=step.microbatch, number=step.number, route=ROUTE, misses=misses)


def test_every_request_ends_with_the_models_own_tokens() -> None:
    ring = Ring()
    draw = random.Random(1)
    requests = [
        request(f"r{i}", [draw.randrange(100) for _ in range(draw.randint(1, 30))], draw.randint(1, 12))
        for i in range(40)
    ]
    for item in requests:
        ring.add(item)
        if ring.sent:
            ring.turn()
    ring.run()
    for item in requests:
        assert ring.results[item.id].row.output == continuation(item.prompt, item.max_tokens)
        assert ring.results[item.id].reason is FinishReason.LENGTH
    assert not ring.scheduler.rows
    assert not ring.scheduler.microbatches
    assert not ring.scheduler.waiting
    assert not ring.cache, "workers must be told to forget every row"


def test_an_end_of_sequence_token_ends_a_row_unless_it_is_to_be_ignored() -> None:
    ring = Ring()
    ring.add(request("ends"), request("goes on", ignore_eos=True))
    for _ in range(len(ring.sent)):
        step = ring.sent.pop(0).step
        done = ring.answer(step)
        ring.take(ring.scheduler.done(replace(done, sampled=tuple(replace(s, token=EOS) for s in done.sampled)), 0.0))
    assert ring.results["ends"].reason is FinishReason.STOP
    assert "goes on" not in ring.results


def test_a_stop_string_ends_a_row_with_the_text_before_it() -> None:
    ring = Ring()
    ring.scheduler = Scheduler(PLAN, "owner", LIMITS, lambda output, stops: "cut" if len(output) == 3 else None)
    ring.add(request("r", stop=("x",)))
    ring.run()
    assert ring.results["r"].text == "cut"
    assert len(ring.results["r"].row.output) == 3


def test_the_context_limit_ends_a_row() -> None:
    ring = Ring()
    ring.add(request("r", range(60), 100))
    ring.run()
    assert len(ring.results["r"].row.output) == 4


def test_no_step_carries_more_new_positions_than_allowed() -> None:
    ring = Ring()
    ring.add(*(request(f"r{i}", range(50)) for i in range(3)))
    while ring.sent:
        assert len(ring.sent[0].step.tokens) <= LIMITS.step_tokens
        ring.turn()
    assert len(ring.results) == 3


def test_a_late_or_repeated_end_of_trip_changes_nothing() -> None:
    ring = Ring()
    ring.add(request("r"))
    step = ring.sent.pop(0).step
    done = ring.answer(step)
    ring.take(ring.scheduler.done(done, 0.0))
    assert ring.scheduler.done(done, 0.0) == []
    ring.run()
    assert ring.results["r"].row.output == continuation((1, 2, 3), 5)
    assert all(isinstance(decision, Forget) for decision in ring.scheduler.done(done, 0.0))


@pytest.mark.parametrize("reason", [MissReason.CACHE, MissReason.ROOM, MissReason.GONE])
def test_a_blameless_miss_is_replayed_as_often_as_it_takes(reason: MissReason) -> None:
    ring = Ring()
    ring.add(request("r"))
    for _ in range(20):
        ring.take(ring.scheduler.done(missed(ring.sent.pop(0).step, reason), 0.0))
    ring.run()
    assert ring.results["r"].row.output == continuation((1, 2, 3), 5)
    assert len(ring.replayed) == 20


@pytest.mark.parametrize("reason", [MissReason.LOST, MissReason.COMPUTE, MissReason.MEMORY, MissReason.NEVER])
def test_a_row_that_fails_three_times_without_progress_becomes_a_failure(reason: MissReason) -> None:
    ring = Ring()
    ring.add(request("r"))
    for _ in range(3):
        assert "r" not in ring.results
        step = ring.sent.pop(0).step
        ring.scheduler.taken(taken(step, "w0"), 0.0)
        ring.take(ring.scheduler.done(missed(step, reason), 0.0))
    assert ring.results["r"].reason is FinishReason.ERROR
    assert ring.results["r"].error
    assert not ring.scheduler.rows


def test_progress_clears_the_blame() -> None:
    ring = Ring()
    ring.add(request("r", max_tokens=8))
    for _ in range(4):
        for _ in range(2):
            ring.take(ring.scheduler.done(missed(ring.sent.pop(0).step, MissReason.COMPUTE), 0.0))
        ring.turn()
    ring.run()
    assert ring.results["r"].row.output == continuation((1, 2, 3), 8)


def test_a_poison_row_does_not_harm_its_neighbours() -> None:
    ring = Ring()
    ring.add(*(request(f"r{i}") for i in range(12)))
    poison = next(row.number for row in ring.scheduler.rows.values() if row.request.id == "r3")
    for _ in range(500):
        if not ring.sent:
            break
        step = ring.sent.pop(0).step
        lost = any(row.row == poison for row in step.rows)
        ring.scheduler.taken(taken(step, "w0"), 0.0)
        ring.take(ring.scheduler.done(missed(step, MissReason.LOST) if lost else ring.answer(step), 0.0))
    assert ring.results["r3"].reason is FinishReason.ERROR
    assert sum(ended.reason is FinishReason.LENGTH for ended in ring.results.values()) == 11


def test_a_suspect_travels_alone_and_is_marked() -> None:
    ring = Ring()
    ring.add(request("a"), request("b"))
    for _ in range(4):
        ring.take(ring.scheduler.done(missed(ring.sent.pop(0).step, MissReason.LOST), 0.0))
    (suspect,) = [send.step for send in ring.sent if send.step.alone]
    assert len(suspect.rows) == 1, "one at a time, by itself"
    ring.run()
    assert len(ring.results) == 2


def test_when_a_worker_is_gone_its_microbatches_are_replayed_on_the_shared_queue() -> None:
    ring = Ring()
    ring.add(request("a"), request("b"))
    for _ in range(len(ring.sent)):
        ring.turn()
    stale = [send.step for send in ring.sent]
    ring.sent.clear()
    ring.take(ring.scheduler.gone("w1", 0.0))
    assert {send.queue for send in ring.sent} == {None}
    for step in stale:
        assert all(
            isinstance(decision, Forget) for decision in ring.scheduler.done(missed(step, MissReason.CACHE), 0.0)
        )
    ring.run()
    assert ring.results["a"].row.output == continuation((1, 2, 3), 5)
    assert all(replayed.row.epoch >= 1 for replayed in ring.replayed)


def test_rows_that_were_only_near_a_poison_outlive_it() -> None:
    """The poison kills its worker beyond its first chunk, when only the route says who was there."""
    ring = Ring()
    ring.add(*(request(f"r{i}", range(20 + i)) for i in range(6)))
    poison = next(row.number for row in ring.scheduler.rows.values() if row.request.id == "r3")
    deaths = 0
    for _ in range(2000):
        if not ring.sent:
            break
        send = ring.sent.pop(0)
        live = ring.scheduler.microbatches.get(send.step.microbatch)
        if live is None or live.step != send.step.number:
            continue
        if any(row.row == poison and row.start > 0 for row in send.step.rows):
            deaths += 1
            for told in (taken(send.step, "w0"), taken(send.step, "w0", passed=True), taken(send.step, "w1")):
                ring.scheduler.taken(told, 0.0)
            ring.take(ring.scheduler.gone("w1", 0.0))
        else:
            ring.take(ring.scheduler.done(ring.answer(send.step), 0.0))
    assert deaths == 3
    assert ring.results["r3"].reason is FinishReason.ERROR
    assert sum(ended.reason is FinishReason.LENGTH for ended in ring.results.values()) == 5


def test_a_row_that_made_progress_alone_is_no_suspect_any_more() -> None:
    ring = Ring()
    ring.add(request("r", max_tokens=9))
    for _ in range(2):
        ring.take(ring.scheduler.done(missed(ring.sent.pop(0).step, MissReason.LOST), 0.0))
    assert ring.sent[0].step.alone
    ring.turn()
    assert not ring.sent[0].step.alone


@pytest.mark.parametrize("reason", [MissReason.ROOM, MissReason.GONE, MissReason.CACHE])
def test_a_suspect_stays_one_when_it_is_missed_for_no_fault_of_its_own(reason: MissReason) -> None:
    ring = Ring()
    ring.add(request("r"))
    for why in (MissReason.LOST, MissReason.LOST, reason):
        ring.take(ring.scheduler.done(missed(ring.sent.pop(0).step, why), 0.0))
    assert ring.sent[0].step.alone


@pytest.mark.parametrize("told", ["nothing", "passed"])
def test_a_suspect_is_not_blamed_for_a_death_that_met_it_waiting(told: str) -> None:
    ring = Ring()
    ring.add(request("r"))
    for _ in range(2):
        ring.take(ring.scheduler.done(missed(ring.sent.pop(0).step, MissReason.LOST), 0.0))
    for how in ("redelivered", "gone", "redelivered"):
        step = ring.sent.pop(0).step
        if told == "passed":
            ring.scheduler.taken(taken(step, "w0"), 0.0)
            ring.scheduler.taken(taken(step, "w0", passed=True), 0.0)
        if how == "gone":
            ring.take(ring.scheduler.gone("w0", 0.0) or ring.scheduler.overdue(1000.0))
        else:
            ring.take(ring.scheduler.done(missed(step, MissReason.LOST), 0.0))
    assert ring.sent[0].step.alone
    (row,) = ring.scheduler.rows.values()
    assert row.failures == MAX_FAILURES - 1


def test_what_becomes_of_a_suspect_is_heard_although_another_worker_of_its_route_is_gone() -> None:
    ring = Ring()
    ring.add(request("a", range(20), failures=2))
    ring.turn()
    step = ring.sent[-1].step
    assert step.alone
    ring.scheduler.taken(taken(step, "w0"), 0.0)
    ring.take(ring.scheduler.gone("w1", 0.0))
    assert not ring.replayed, "w0 computes it just now"
    ring.take(ring.scheduler.gone("w0", 0.0))
    assert ring.results["a"].reason is FinishReason.ERROR


def test_a_suspect_that_its_worker_has_not_yet_begun_is_not_given_up_for_another() -> None:
    """That worker may be computing others first; it would kill it all the same, and nobody would know."""
    ring = Ring()
    ring.add(request("a", range(20), failures=2))
    ring.turn()
    ring.take(ring.scheduler.gone("w1", 0.0))
    assert not ring.replayed
    ring.take(ring.scheduler.gone("w0", 0.0))
    assert [replayed.row.failures for replayed in ring.replayed] == [2], "it had not begun: no blame"


def test_rows_that_one_death_sent_back_do_not_wait_for_a_whole_microbatch_to_end() -> None:
    """Until their blame is kept others take the place of theirs."""
    ring = Ring()
    ring.add(*(request(f"r{i}", max_tokens=60) for i in range(16)))
    for _ in range(4):
        ring.turn()
    ring.add(*(request(f"late{i}", max_tokens=60 if i == 3 else 2) for i in range(4)))
    blamed = list(ring.scheduler.microbatches[ring.sent[0].step.microbatch].rows)
    decisions = ring.scheduler.done(missed(ring.sent.pop(0).step, MissReason.LOST), 0.0)
    ring.sent += [decision for decision in decisions if isinstance(decision, Send)]
    assert all(row in ring.scheduler.waiting for row in blamed)
    for row in blamed:
        row.kept_failures = row.failures
    for _ in range(30):
        ring.turn()
    assert sum(row in ring.scheduler.waiting for row in blamed) == 1, "there was room for three"


def test_a_suspect_is_replayed_once_it_is_passed_on_to_a_worker_that_is_gone() -> None:
    ring = Ring()
    ring.add(request("a", range(20), failures=2))
    ring.turn()
    step = ring.sent[-1].step
    ring.scheduler.taken(taken(step, "w0"), 0.0)
    ring.scheduler.taken(taken(step, "w0", passed=True), 0.0)
    ring.take(ring.scheduler.gone("w1", 0.0))
    assert [replayed.row.failures for replayed in ring.replayed] == [2]


def test_a_row_waits_until_what_it_is_blamed_for_is_kept() -> None:
    """Or it might kill again before its coordinator is lost, with nothing to tell the next one."""
    ring = Ring()
    ring.add(request("a"))
    decisions = ring.scheduler.done(missed(ring.sent.pop().step, MissReason.LOST), 0.0)
    assert not [decision for decision in decisions if isinstance(decision, Send)]
    assert not ring.scheduler.form(0.0)
    (row,) = ring.scheduler.rows.values()
    row.kept_failures = 1
    (send,) = ring.scheduler.form(0.0)
    assert isinstance(send, Send)


def test_blame_that_is_just_being_forgotten_in_the_broker_does_not_stand_for_a_new_one() -> None:
    ring = Ring()
    ring.add(request("a", failures=1))
    (row,) = ring.scheduler.rows.values()
    row.failures = 0  # progress
    assert row.outgoing().failures == 0
    row.failures = 1
    assert not row.ready


def test_rows_that_come_one_after_the_other_are_spread_evenly() -> None:
    """The first microbatch to come home must not take all that wait, or the other's trips are all but empty."""
    ring = Ring()
    for index in range(6):
        ring.add(request(f"r{index}", max_tokens=20))
    for _ in range(4):
        ring.turn()
    assert sorted(len(microbatch.rows) for microbatch in ring.scheduler.microbatches.values()) == [3, 3]


def test_where_all_rows_of_a_microbatch_end_another_gives_half_of_its_own_to_a_new_one() -> None:
    """Or half of a chain's workers would wait, whichever has it in its hands."""
    ring = Ring()
    ring.add(*(request(f"r{i}", (1, 2), max_tokens=3 if i < 4 else 20) for i in range(8)))
    _, long = ring.scheduler.microbatches.values()
    ring.until(4)
    microbatches = ring.scheduler.microbatches
    assert list(microbatches.values()) == [long]
    ring.turn()
    (new,) = (each for each in microbatches.values() if each is not long)
    assert (len(long.rows), len(new.rows)) == (2, 2)
    assert (new.route, new.step) == (ROUTE, long.step), "it goes on as the other would have"
    ring.run()
    assert len(ring.results) == 8
    assert not ring.replayed


def evened(ring: Ring) -> tuple[int, list[int]]:
    """Rows of the first microbatch, 3 of whose rows have ended, and of the others when the second has come home."""
    first, second = ring.scheduler.microbatches.values()
    ring.until(3)
    while ring.sent[0].step.microbatch != second.number:
        ring.turn()
    ring.turn()
    return len(first.rows), [len(each.rows) for each in ring.scheduler.microbatches.values() if each is not first]


@pytest.mark.parametrize(
    ("consumers", "closed", "sizes"),
    [
        ([1, 1], (), (2, [3])),
        ([1, 2], (), (1, [4])),  # there their speed decides
        ([1, 1], (0,), (1, [4])),
        ([1, 1], (1,), (1, [4])),
    ],
)
def test_rows_go_over_only_where_single_workers_serve_open_microbatches(
    consumers: list[int], closed: tuple[int, ...], sizes: tuple[int, list[int]]
) -> None:
    ring = Ring()
    ring.add(*(request(f"r{i}", (1, 2), max_tokens=3 if i < 3 else 20) for i in range(8)))
    ring.scheduler.consumers = consumers
    for number, microbatch in enumerate(ring.scheduler.microbatches.values()):
        microbatch.closed = number in closed
    assert evened(ring) == sizes
    ring.run()
    assert len(ring.results) == 8
    assert not ring.replayed
    assert all(ring.results[f"r{i}"].row.output == continuation((1, 2), 20) for i in range(3, 8))


def test_rows_stay_where_they_are_while_another_microbatch_has_no_route_yet() -> None:
    """It may find other workers."""
    ring = Ring()
    ring.add(*(request(f"r{i}", (1, 2), max_tokens=20) for i in range(8)))
    ring.turn()
    ring.turn()
    step = ring.sent.pop(0).step
    misses = missed(step, MissReason.ROOM, step.rows[0].row).misses
    ring.take(ring.scheduler.done(replace(ring.answer(step), misses=misses), 0.0))
    lonely, second = ring.sent.pop(), ring.sent[0]
    assert (lonely.queue, len(lonely.step.rows)) == (None, 1)
    ring.turn()
    others = [each for each in ring.scheduler.microbatches.values() if each.number != lonely.step.microbatch]
    assert sorted(len(each.rows) for each in others) == [3, 4]
    assert len(second.step.rows) == 4
    ring.sent.append(lonely)
    ring.run()
    assert len(ring.results) == 8


def test_no_rows_go_over_where_fewer_microbatches_would_do() -> None:
    """The small one is to end: a forward for it would cost more than it saves."""
    ring = Ring()
    ring.scheduler = Scheduler(replace(PLAN, stages=(StageSpec(first=0, end=2),)), "owner", LIMITS, lambda *_: None)
    ring.routes = lambda microbatch: ("w0",)
    ring.add(*(request(f"r{i}", (1, 2), max_tokens=3 if i < 3 else 20) for i in range(7)))
    assert [len(each.rows) for each in ring.scheduler.microbatches.values()] == [4, 3]
    ring.until(3)
    for _ in range(4):
        ring.turn()
    assert [len(each.rows) for each in ring.scheduler.microbatches.values()] == [1, 3]
    ring.run()
    assert len(ring.results) == 7


@pytest.mark.parametrize(("workers", "sizes"), [((1, 1), [3, 3]), ((1, 2), [4, 2, 2, 2, 2])])
def test_where_workers_share_a_stage_rows_join_the_microbatch_whose_trips_are_shorter(
    workers: tuple[int, int], sizes: list[int]
) -> None:
    ring = Ring()
    ring.scheduler.consumers = list(workers)
    ring.routes = lambda microbatch: ("w0", f"w1.{microbatch % workers[1]}")
    ring.add(*(request(f"r{i}", max_tokens=40) for i in range(2 * len(sizes))))
    trip_s = {send.step.microbatch: 3.0 if at else 1.0 for at, send in enumerate(ring.sent)}
    home = [(trip_s[send.step.microbatch], send.step) for send in ring.sent]
    for number in range(10 * len(sizes)):
        if number == 8 * len(sizes):
            ring.add(request("late"), request("later"))
        home.sort(key=lambda each: each[0])
        now_s, step = home.pop(0)
        ring.sent.clear()
        ring.take(ring.scheduler.done(ring.answer(step), now_s))
        home += [(now_s + trip_s[send.step.microbatch], send.step) for send in ring.sent]
    assert [len(ring.scheduler.microbatches[number].rows) for number in trip_s] == sizes


def test_a_row_never_reserves_more_than_the_context() -> None:
    ring = Ring()
    ring.add(request("r", max_tokens=2**63 - 1))
    assert ring.sent[0].step.rows[0].reserve == PLAN.context_tokens


def test_a_request_that_has_all_its_tokens_already_ends_at_once() -> None:
    ring = Ring()
    ring.add(request("full", max_tokens=2, output=(10, 11)), request("stopped", max_tokens=9, output=(10, EOS)))
    assert not ring.sent
    assert ring.results["full"].reason is FinishReason.LENGTH
    assert ring.results["stopped"].reason is FinishReason.STOP
    assert not ring.scheduler.rows


def test_a_token_that_does_not_exist_is_not_believed() -> None:
    ring = Ring()
    ring.add(request("r"))
    done = ring.answer(ring.sent.pop(0).step)
    ring.take(ring.scheduler.done(replace(done, sampled=tuple(replace(s, token=2**62) for s in done.sampled)), 0.0))
    assert [replayed.detail for replayed in ring.replayed] == ["no such token"]


def test_a_trip_that_comes_home_after_it_was_given_up_leaves_nothing_behind() -> None:
    ring = Ring()
    ring.add(request("r"))
    late = ring.sent.pop(0).step
    ring.take(ring.scheduler.overdue(11.0))
    ring.take(ring.scheduler.done(ring.answer(late), 0.0))
    ring.run()
    assert not ring.cache


def test_microbatches_that_nobody_may_join_do_not_keep_others_from_forming() -> None:
    ring = Ring()
    ring.add(*(request(f"long{i}", max_tokens=40) for i in range(3)))
    for _ in range(len(ring.sent)):
        done = ring.answer(ring.sent.pop(0).step)
        ring.take(ring.scheduler.done(replace(done, closing=True), 0.0))
    before = len(ring.scheduler.microbatches)
    ring.add(request("new"))
    assert len(ring.scheduler.microbatches) == before + 1


def test_an_overdue_step_is_replayed_and_its_late_end_is_stale() -> None:
    ring = Ring()
    ring.add(request("r"))
    step = ring.sent.pop(0).step
    assert ring.scheduler.overdue(5.0) == []
    ring.take(ring.scheduler.overdue(11.0))
    assert all(isinstance(decision, Forget) for decision in ring.scheduler.done(ring.answer(step), 0.0))
    ring.cache.clear()
    ring.run()
    assert ring.results["r"].row.output == continuation((1, 2, 3), 5)


def test_rows_do_not_join_a_closing_microbatch() -> None:
    ring = Ring()
    ring.add(request("first", max_tokens=20))
    done = ring.answer(ring.sent.pop(0).step)
    ring.take(ring.scheduler.done(replace(done, closing=True), 0.0))
    closing = done.microbatch
    ring.add(*(request(f"r{i}") for i in range(10)))
    while ring.sent:
        step = ring.sent[0].step
        if step.microbatch == closing:
            assert len(step.rows) == 1
        ring.turn()
    assert len(ring.results) == 11


@pytest.mark.parametrize(("before", "now", "joined"), [(0, 1, True), (1, 1, True), (2, 1, True), (1, 2, False)])
def test_where_a_worker_has_come_rows_join_no_route_that_was_there_before(before: int, now: int, joined: bool) -> None:
    ring = Ring()
    ring.scheduler.seen(1, before)
    ring.add(request("first", max_tokens=20))
    ring.turn()
    old = set(ring.scheduler.microbatches)
    ring.scheduler.seen(1, now)
    ring.add(*(request(f"r{i}", max_tokens=30) for i in range(40)))
    most = 0
    while ring.sent:
        step = ring.sent[0].step
        most = max(most, len(step.rows) if step.microbatch in old else 0)
        ring.turn()
    assert (most > 1) is joined
    assert len(ring.results) == 41


def on_first_trips(ring: Ring) -> int:
    return sum(1 for microbatch in ring.scheduler.microbatches.values() if not microbatch.route)


def redrawing(workers: int, old: int = 4) -> Ring:
    """So many old rows, whose microbatches nobody joins, and eight that wait for new ones; `workers` at stage 1."""
    ring = Ring()
    ring.scheduler.seen(1, workers)
    ring.add(*(request(f"old{i}", max_tokens=20) for i in range(old)))
    while on_first_trips(ring):
        ring.turn()
    for microbatch in ring.scheduler.microbatches.values():
        microbatch.closed = True
    ring.add(*(request(f"new{i}", max_tokens=20) for i in range(8)))
    return ring


@pytest.mark.parametrize(("workers", "most"), [(2, 1), (1, 3)])
def test_routes_are_drawn_anew_few_at_a_time_where_workers_share_a_stage(workers: int, most: int) -> None:
    ring = redrawing(workers)
    seen = []
    while ring.sent:
        seen.append(on_first_trips(ring))
        ring.turn()
    assert max(seen) == most
    assert len(ring.results) == 12


def test_a_first_trip_that_hangs_does_not_hold_up_others_for_long() -> None:
    ring = redrawing(2)
    assert on_first_trips(ring) == 1
    ring.take(ring.scheduler.form(LONG_FIRST_TRIP_S / 2))
    assert on_first_trips(ring) == 1
    ring.take(ring.scheduler.form(LONG_FIRST_TRIP_S))
    assert on_first_trips(ring) == 2


def test_one_long_row_on_an_old_route_does_not_hold_up_others() -> None:
    assert on_first_trips(redrawing(2, old=1)) > 1


@pytest.mark.parametrize(("workers", "routes", "more"), [(1, 1, 0), (2, 2, 0), (2, 1, 2)])
def test_for_a_worker_that_no_route_leads_to_a_few_more_are_drawn_one_at_a_time(
    workers: int, routes: int, more: int
) -> None:
    ring = Ring()
    ring.scheduler.seen(1, workers)
    ring.routes = lambda microbatch: ("w0", f"w1.{microbatch % routes}")
    ring.add(*(request(f"r{i}", max_tokens=60) for i in range(10)))
    while on_first_trips(ring):
        ring.turn()
    target = ring.scheduler.target()
    assert len(ring.scheduler.microbatches) == target
    for i in range(0, 6, 2):
        ring.add(request(f"later{i}", max_tokens=60))
        ring.add(request(f"later{i + 1}", max_tokens=60))
        assert on_first_trips(ring) <= 1, "the second joins another"
        for _ in range(2 * target):
            ring.turn()
    assert len(ring.scheduler.microbatches) == ring.scheduler.target() + more
    ring.run()
    assert len(ring.results) == 16


def test_a_worker_that_was_full_for_a_while_is_no_newcomer() -> None:
    ring = Ring()
    ring.scheduler.seen(1, 2)
    ring.add(request("first", max_tokens=20), request("second", max_tokens=20))
    ring.turn()
    ring.turn()
    of_two = zip(ring.scheduler.microbatches.values(), ("a", "b"), strict=True)
    for microbatch, worker in of_two:
        microbatch.route = (microbatch.route[0], worker, *microbatch.route[2:])
    ring.scheduler.seen(1, 1)
    ring.scheduler.seen(1, 2)
    assert not any(microbatch.closed for microbatch in ring.scheduler.microbatches.values())
    ring.scheduler.seen(1, 3)
    assert all(microbatch.closed for microbatch in ring.scheduler.microbatches.values())


def test_a_checkpoint_goes_on_where_it_was_kept() -> None:
    ring = Ring()
    ring.add(request("r", max_tokens=6))
    for _ in range(3):
        ring.turn()
    kept = next(iter(ring.scheduler.rows.values())).checkpoint()
    assert len(kept.output) == 3
    other = Ring()
    other.add(kept)
    other.run()
    assert other.results["r"].row.output == continuation((1, 2, 3), 6)


def test_the_seed_and_position_of_a_draw_are_the_requests_own() -> None:
    ring = Ring()
    ring.add(request("r", sampling=Sampling(temperature=1.0, seed=42)))
    assert ring.sent[0].step.rows[0].sampling == Sampling(temperature=1.0, seed=42)


def test_random_faults_never_change_a_result() -> None:
    for seed in range(30):
        draw = random.Random(seed)
        ring = Ring()
        requests = [request(f"r{i}", range(draw.randint(1, 20)), draw.randint(1, 9)) for i in range(20)]
        ring.add(*requests)
        for _ in range(5000):
            if not ring.sent:
                break
            send = ring.sent.pop(draw.randrange(len(ring.sent)))
            fault = draw.random()
            if fault < 0.05:
                reason = draw.choice([MissReason.CACHE, MissReason.ROOM, MissReason.GONE])
                ring.take(ring.scheduler.done(missed(send.step, reason), 0.0))
            elif fault < 0.08 and send.queue is not None:
                ring.take(ring.scheduler.unsent(send.step.microbatch, send.queue, 0.0))
            elif fault < 0.10:
                ring.sent.append(send)
                ring.take(ring.scheduler.overdue(11.0))
            else:
                live = ring.scheduler.microbatches.get(send.step.microbatch)
                if live is not None and live.step == send.step.number:
                    ring.take(ring.scheduler.done(ring.answer(send.step), 0.0))
        for item in requests:
            assert ring.results[item.id].row.output == continuation(item.prompt, item.max_tokens), f"seed {seed}"


def test_a_worker_that_dies_with_a_first_trip_in_its_hands_is_held_against_the_rows_at_once() -> None:
    ring = Ring()
    ring.add(request("a"))
    ring.scheduler.taken(taken(ring.sent.pop().step, "w0"), 0.0)
    assert ring.scheduler.workers == ["w0"]
    ring.take(ring.scheduler.gone("w0", 0.0))
    (row,) = ring.scheduler.rows.values()
    assert (row.failures, row.epoch) == (1, 1)


def test_a_worker_that_has_passed_a_first_trip_on_is_not_taken_for_the_one_that_computes_it() -> None:
    ring = Ring()
    ring.add(request("a"))
    step = ring.sent.pop().step
    for worker in ROUTE:
        ring.scheduler.taken(taken(step, worker), 0.0)
    for _ in range(2):
        ring.take(ring.scheduler.gone("w0", 0.0))
    (row,) = ring.scheduler.rows.values()
    assert row.failures == 1


def test_blame_that_a_checkpoint_brought_along_counts_with_what_comes_after() -> None:
    """Or a row that kills would take more workers with it for every coordinator that is lost."""
    ring = Ring()
    ring.add(request("a", range(20), failures=1))
    ring.turn()
    ring.take(ring.scheduler.gone("w1", 0.0))
    (row,) = ring.scheduler.rows.values()
    assert (row.failures, row.alone) == (2, True)


def test_who_took_another_step_than_the_one_under_way_says_nothing() -> None:
    ring = Ring()
    ring.add(request("a"))
    ring.turn()
    step = ring.sent[-1].step
    ring.scheduler.taken(taken(replace(step, number=step.number - 1), "w9"), 0.0)
    ring.scheduler.taken(taken(step, "w9"), 0.0)
    assert ring.scheduler.workers == list(ROUTE)


def test_a_pipeline_slower_than_the_step_timeout_is_given_more_time_until_it_is_idle() -> None:
    ring = Ring()
    ring.add(request("a"))
    sent_s = 0.0
    for timeout_s in (10.0, 20.0, 40.0, 80.0, 80.0):
        assert ring.sent[-1].step.ttl_s == timeout_s
        assert ring.scheduler.overdue(sent_s + timeout_s) == []
        sent_s += timeout_s + 1.0
        ring.take(ring.scheduler.overdue(sent_s))
    ring.run()
    assert ring.scheduler.overdue(sent_s) == []
    ring.add(request("b"))
    assert ring.sent[-1].step.ttl_s == 10.0


def test_every_row_of_a_first_trip_that_comes_home_too_late_is_forgotten_where_it_was_computed() -> None:
    ring = Ring()
    ring.add(request("long", range(20)), request("short"))
    late = ring.sent[0].step
    ring.take(ring.scheduler.overdue(11.0))
    end = StepDone(plan=late.plan, microbatch=late.microbatch, number=late.number, route=ROUTE)
    forgotten = ring.scheduler.done(end, 11.0)
    rows = tuple((row.row, row.epoch) for row in late.rows)
    assert [(f.queue, f.release.rows) for f in forgotten if isinstance(f, Forget)] == [(queue, rows) for queue in ROUTE]
