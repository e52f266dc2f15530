"""Fixtures: for the command line a tiny model, its plan, prompts, and commands as processes; for actors a fleet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Process, write_prompts
from fakes import make_plan as fake_plan
from families import Tiny, save
from fleet import Fleet, Job
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mqinfer import plan as plans
from mqinfer.checkpoint import make_plan
from mqinfer.queues import new_id
from mqinfer.transports import open_transport


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four layers whose tokens are characters."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(Tiny(family="llama"), folder)
    alphabet = {character: number for number, character in enumerate(["<unk>", *map(chr, range(32, 127))])}
    raw = Tokenizer(models.BPE(vocab=alphabet, merges=[], unk_token="<unk>"))
    raw.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(model: Path, tmp_path: Path) -> Path:
    """The file of a plan of two stages, under a name of its own."""
    plan, _ = make_plan(str(model), stages=2, dtype="float32", name=new_id("cli"))
    plans.write(plan, tmp_path / "pipeline.toml")
    return tmp_path / "pipeline.toml"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", 5)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts commands as processes, which are gone after the test."""
    started: list[Process] = []

    def start(*arguments: object, **more: Any) -> Process:
        started.append(Process(tmp_path, *arguments, **more))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()
        running.process.wait()


@pytest.fixture
async def fleet(transport_url: str) -> AsyncIterator[Fleet]:
    """Actors in tasks of the test, over both transports."""
    fleet = Fleet(transport_url, fake_plan(new_id("t")))
    yield fleet
    await fleet.close()


@pytest.fixture
async def job(fleet: Fleet) -> AsyncIterator[Job]:
    """A job for that fleet."""
    transport = await open_transport(fleet.url)
    job = Job(fleet, transport)
    yield job
    await job._producer.forget()
    await transport.close()
