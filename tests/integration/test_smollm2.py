"""SmolLM2 in three stages, as real processes over a real RabbitMQ, compared with `generate` on the whole model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from broker import Broker

from mqinfer import checkpoint, plan
from mqinfer.queues import new_id

pytestmark = [pytest.mark.smollm2, pytest.mark.broker, pytest.mark.timeout(400)]

#: The rows end at unlike times, so that there is a middle of the job in which some are done.
NEW_TOKENS = {f"p{i}": 5 + 7 * (i % 7) for i in range(18)}
PATIENCE_S = 180.0
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
    """Where scripts/setup puts the demo model."""
    home = Path(os.environ.get("MQINFER_HOME", Path.home() / ".cache" / "mqinfer"))
    found = home / "models" / "SmolLM2-135M-Instruct"
    if not (found / "config.json").exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("the demo model is missing: run scripts/setup")
    return found


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


class Fleet:
    """Actors as processes; `logs` of all of them are shown when a test fails."""

    def __init__(self, folder: Path, model: Path, broker: Broker) -> None:
        self.folder = folder
        self.broker = broker
        self.pipeline = folder / "pipeline.toml"
        made, _ = checkpoint.make_plan(str(model), stages=3, cuts=None, dtype="float32", name=new_id("smol"))
        plan.write(made, self.pipeline)
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, log: str = "fleet.log") -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MQINFER_THREADS": "1"}
        options = ("--pipeline", str(self.pipeline), "--broker", self.broker.url)
        with (self.folder / log).open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "mqinfer", *command, *options], stdout=file, stderr=file, env=environment
            )
        self.running.append(process)
        return process

    def worker(self, stage: int) -> subprocess.Popen[bytes]:
        return self.start("worker", "--stage", str(stage))

    def batch(self, prompts: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
        bodies = {
            name: {"messages": [{"role": "user", "content": prompt}], "max_tokens": NEW_TOKENS[name], "temperature": 0}
            for name, prompt in prompts.items()
        }
        lines = [
            {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
            for name, body in bodies.items()
        ]
        file = output.with_suffix(".prompts")
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return self.start("batch", str(file), "-o", str(output), log="batch.log")

    def status(self) -> str:
        options = ("--pipeline", str(self.pipeline), "--broker", self.broker.url)
        done = subprocess.run(
            [sys.executable, "-m", "mqinfer", "status", *options], capture_output=True, text=True, check=False
        )
        return done.stdout

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def end(self) -> None:
        for process in self.running:
            process.kill()
        for process in self.running:
            process.wait()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, folder: Path, broker: Broker) -> Iterator[Fleet]:
    """One coordinator, one worker on stages 0 and 1, two on stage 2."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), folder, broker)
    try:
        fleet.start("coordinator", "--rows", "6")  # fewer than there are prompts: some wait, some run, some are done
        for stage in (0, 1, 2, 2):
            fleet.worker(stage)
        yield fleet
    finally:
        fleet.end()


def wait_until(what: Callable[[], bool], fleet: Fleet) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, fleet.logs()
        time.sleep(0.05)


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in output.read_bytes().splitlines()] if output.exists() else []


def check(batch: subprocess.Popen[bytes], output: Path, expected: dict[str, str], fleet: Fleet) -> None:
    assert batch.wait(PATIENCE_S) == 0, fleet.logs()
    found = rows(output)
    assert len(found) == len(expected), "one row per custom_id"
    answers = {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in found}
    assert answers == expected


def test_a_fleet_answers_as_the_whole_model_does(
    fleet: Fleet, prompts: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    check(fleet.batch(prompts, output), output, expected, fleet)


def test_status_shows_every_stage_and_its_consumers(fleet: Fleet) -> None:
    status = fleet.status()
    for stage in range(3):
        assert f"stage {stage}" in status


def test_a_worker_killed_in_the_middle_of_decoding_changes_nothing(
    fleet: Fleet, prompts: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    batch = fleet.batch(prompts, output)
    wait_until(lambda: len(rows(output)) >= 2, fleet)
    victim = fleet.running[2]
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert len(rows(output)) < len(prompts), "it was to die in the middle"
    fleet.worker(1)
    check(batch, output, expected, fleet)


def test_a_broker_restarted_in_the_middle_changes_nothing(
    fleet: Fleet, prompts: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    batch = fleet.batch(prompts, output)
    wait_until(lambda: len(rows(output)) >= 2, fleet)
    fleet.broker.restart()
    assert len(rows(output)) < len(prompts), "it was to go away in the middle"
    check(batch, output, expected, fleet)


def test_a_worker_that_joins_a_running_job_takes_work_within_seconds(
    fleet: Fleet, prompts: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    late = fleet.start("worker", "--stage", "0", "--log-level", "debug", log="late.log")
    batch = fleet.batch(prompts, output)
    check(batch, output, expected, fleet)
    assert "step.computed" in (fleet.folder / "late.log").read_text()
    late.send_signal(signal.SIGTERM)
    assert late.wait(PATIENCE_S) == 0, fleet.logs()


def test_on_sigterm_every_actor_drains_and_exits_with_0(fleet: Fleet) -> None:
    living = [process for process in fleet.running if process.poll() is None]
    assert len(living) == 5
    for process in living:
        process.send_signal(signal.SIGTERM)
    assert [process.wait(PATIENCE_S) for process in living] == [0] * 5, fleet.logs()
