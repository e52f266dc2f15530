"""SmolLM2 in three stages, as real processes over a real RabbitMQ, compared with `generate` on the whole model."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker import Broker
from processes import Actor, Fleet, demo_model, rows, wait_until

pytestmark = [pytest.mark.smollm2, pytest.mark.broker, pytest.mark.timeout(400)]

#: The rows end at unlike times, so that there is a middle of the job in which some are done.
NEW_TOKENS = {f"p{i}": 4 + 4 * (i % 7) for i in range(18)}
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colors and say what each of them is often used for in painting.",
    "Why is the sky blue? Explain it to a child, in a few sentences, and name the person who found it out.",
    "Write a haiku.",
    "List the days of the week.",
    "How does a steam engine work? " * 6,
)


@pytest.fixture(scope="module")
def folder() -> Path:
    """The demo model."""
    return demo_model()


@pytest.fixture(scope="module")
def prompts() -> dict[str, str]:
    """18 prompts of unequal lengths."""
    return {name: f"{i}. {QUESTIONS[i % len(QUESTIONS)]}" for i, name in enumerate(NEW_TOKENS)}


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: dict[str, str]) -> dict[str, str]:
    """What `generate` answers, one prompt at a time, greedily, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.set_num_threads(1)
    answers = {}
    for name, prompt in prompts.items():
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS[name],
                pad_token_id=tokenizer.eos_token_id,
            )
        answers[name] = tokenizer.decode(
            out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    return answers


def batch(fleet: Fleet, prompts: dict[str, str], output: Path) -> Actor:
    """`prompts` by name; what follows a dot in it tells repetitions apart."""
    bodies = {
        name: {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": NEW_TOKENS[name.partition(".")[0]],
            "temperature": 0,
        }
        for name, prompt in prompts.items()
    }
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        for name, body in bodies.items()
    ]
    file = output.with_suffix(".prompts")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return fleet.start("batch", "batch", str(file), "-o", str(output))


def worker(fleet: Fleet, stage: int) -> Actor:
    return fleet.start(f"worker-{stage}", "worker", "--stage", str(stage))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, folder: Path, broker: Broker) -> Iterator[Fleet]:
    """One coordinator, one worker on stages 0 and 1, two on stage 2."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), folder, broker.url)
    try:
        # Fewer rows than there are prompts: some wait, some run, some are done.
        fleet.start("coordinator", "coordinator", "--rows", "6")
        for stage in (0, 1, 2, 2):
            worker(fleet, stage)
        yield fleet
    finally:
        fleet.end()


def check(job: Actor, output: Path, expected: dict[str, str], fleet: Fleet) -> None:
    assert job.wait() == 0, fleet.logs()
    found = rows(output)
    assert len(found) == len(expected), "one row per custom_id"
    answers = {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in found}
    assert answers == expected


def test_a_fleet_answers_as_the_whole_model_does(
    fleet: Fleet, prompts: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    check(batch(fleet, prompts, output), output, expected, fleet)


def test_status_shows_every_stage_and_its_consumers(fleet: Fleet) -> None:
    status = fleet.ask("status").stdout
    for stage in range(3):
        assert f"stage {stage}" in status


def test_a_worker_killed_in_the_middle_of_decoding_changes_nothing(
    fleet: Fleet, prompts: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    job = batch(fleet, prompts, output)
    wait_until(lambda: len(rows(output)) >= 2, fleet)
    victim = fleet.actors[2]
    victim.kill()
    assert len(rows(output)) < len(prompts), "it was to die in the middle"
    victim.restart()
    check(job, output, expected, fleet)


def test_a_broker_restarted_in_the_middle_changes_nothing(
    broker: Broker, fleet: Fleet, prompts: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    job = batch(fleet, prompts, output)
    wait_until(lambda: len(rows(output)) >= 2, fleet)
    broker.restart()
    assert len(rows(output)) < len(prompts), "it was to go away in the middle"
    check(job, output, expected, fleet)


def test_a_worker_that_joins_a_running_job_takes_work_within_seconds(
    fleet: Fleet, prompts: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    times = range(4)  # so that the job outlasts the worker's start
    job = batch(fleet, {f"{name}.{turn}": prompt for turn in times for name, prompt in prompts.items()}, output)
    late = fleet.start("late", "worker", "--stage", "0", "--log-level", "debug")
    try:
        check(job, output, {f"{name}.{turn}": answer for turn in times for name, answer in expected.items()}, fleet)
        assert "step.computed" in late.said()
    finally:
        late.signal(signal.SIGTERM)
    assert late.wait() == 0, fleet.logs()


def test_on_sigterm_every_actor_drains_and_exits_with_0(fleet: Fleet) -> None:
    living = [actor for actor in fleet.actors if actor.lives]
    assert len(living) == 5
    for actor in living:
        actor.signal(signal.SIGTERM)
    assert [actor.wait() for actor in living] == [0] * 5, fleet.logs()
