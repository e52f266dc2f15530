"""The command line as people meet it: help, errors, exit codes, Ctrl-C, and a fleet of real processes.

Commands run in this process where nothing but their words matters, and as processes where signals, imports or exit
codes do. The model is a tiny random one.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import typer
from command_line import PATIENCE_S, Ended, Process, rows, write_prompts
from typer.core import TyperGroup
from typer.testing import CliRunner

from mqinfer import cli, observe
from mqinfer import plan as plans
from mqinfer.link import publish_declared
from mqinfer.messages import Request
from mqinfer.queues import Topology, results
from mqinfer.transports import open_transport
from mqinfer.wire import encode

#: As on a machine where only `pip install mqinfer` was run, without the extra `worker`.
WITHOUT_TORCH = """\
import importlib.machinery, sys
absent, path = {"torch", "zstandard", "safetensors"}, importlib.machinery.PathFinder
find = path.find_spec
path.find_spec = lambda name, *rest: None if name.split(".")[0] in absent else find(name, *rest)
from mqinfer.cli import main
main()
"""


# As a process


def test_help_needs_no_library_but_the_command_line_s(start: Callable[..., Process]) -> None:
    program = """\
import sys
from mqinfer.cli import app
try:
    app(["--help"])
finally:
    print(*{name.partition(".")[0] for name in sys.modules})
"""
    ended = start(program=("-c", program)).end()
    assert ended.code == 0
    loaded = set(ended.out.splitlines()[-1].split())
    assert not loaded & {"torch", "transformers", "pydantic", "aio_pika", "rich", "structlog", "numpy"}


def test_a_plan_is_made_where_there_is_no_torch(start: Callable[..., Process], model: Path, tmp_path: Path) -> None:
    ended = start("plan", model, "--stages", 2, "-o", tmp_path / "p.toml", program=("-c", WITHOUT_TORCH)).end()
    assert (ended.code, ended.err) == (0, f"wrote {tmp_path / 'p.toml'}\n")
    assert "share of cost" in ended.out
    assert len(plans.read(tmp_path / "p.toml").stages) == 2


def test_a_coordinator_works_where_there_is_no_torch_and_sigterm_drains_it(
    start: Callable[..., Process], pipeline: Path
) -> None:
    coordinator = start("coordinator", "-p", pipeline, "--broker", "memory://x", program=("-c", WITHOUT_TORCH))
    coordinator.said("link.opened")
    ended = coordinator.end(signal.SIGTERM)
    assert ended.code == 0
    assert "coordinator.drained" in ended.err
    assert "torch" not in ended.err.lower()


@pytest.mark.parametrize(
    "command",
    [["batch", "{prompts}", "-o", "{out}", "--model", "{model}"], ["worker", "-p", "{pipeline}", "--stage", "0"]],
    ids=["batch", "worker"],
)
def test_what_needs_torch_says_so_where_there_is_none(
    start: Callable[..., Process], command: list[str], model: Path, pipeline: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    filled = [part.format(prompts=prompts, out=out, model=model, pipeline=pipeline) for part in command]
    ended = start(*filled, program=("-c", WITHOUT_TORCH)).end()
    assert ended.code == 2
    assert re.fullmatch(r"mqinfer: .* needs mqinfer\[worker\] \(No module named '\w+'\)\n", ended.err)


def test_a_file_is_answered_in_this_process_and_a_bad_line_costs_only_itself(
    start: Callable[..., Process], model: Path, prompts: Path, tmp_path: Path
) -> None:
    with prompts.open("a") as file:
        file.write("nonsense\n")
    batch = ("batch", prompts, "-o", tmp_path / "out.jsonl", "--model", model, "--stages", 2, "--kv-bytes", "8MiB")
    ended = start(*batch).end()
    assert (ended.code, ended.out) == (3, ""), ended.err
    told = ended.err.splitlines()
    assert re.fullmatch(r"stage 0, layers \[0, 2\): [\d.]+ KiB of weights in .*, up to 4.0 MiB more .*", told[0])
    assert told[-1] == f"done: 5 answered, 1 failed -> {tmp_path / 'out.jsonl'}"
    assert len(told) == 3
    assert sorted(row["custom_id"] or "" for row in rows(tmp_path / "out.jsonl")) == [
        "",
        *(f"id-{i}" for i in range(5)),
    ]


def test_ctrl_c_stops_a_batch_here_and_the_same_command_goes_on(
    start: Callable[..., Process], model: Path, tmp_path: Path
) -> None:
    prompts, out = write_prompts(tmp_path / "p.jsonl", 200, max_tokens=30), tmp_path / "out.jsonl"
    command = ("batch", prompts, "-o", out, "--model", model, "--stages", 2, "--kv-bytes", "64MiB")
    first = start(*command)
    first.until(lambda: out.exists() and out.stat().st_size > 0)
    ended = first.end(signal.SIGINT)
    assert ended.code == 130
    assert "the rest is not done. Run the same command again to go on." in ended.err
    assert all(line.startswith(("stage ", "p.jsonl: ", "stopped: ")) for line in ended.err.splitlines()), ended.err
    assert 0 < len(rows(out)) < 200
    again = start(*command).end()
    assert again.code == 0, again.err
    assert sorted(row["custom_id"] for row in rows(out)) == sorted(f"id-{i}" for i in range(200))


#: No file may grow beyond 8 KiB, as if the disk were full then.
SMALL_DISK = """\
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
from mqinfer.cli import main
main()
"""


def test_a_full_disk_ends_a_batch_in_one_sentence_and_the_same_command_goes_on(
    start: Callable[..., Process], model: Path, tmp_path: Path
) -> None:
    prompts, out = write_prompts(tmp_path / "p.jsonl", 60), tmp_path / "out.jsonl"
    command = ("batch", prompts, "-o", out, "--model", model, "--stages", 2, "--kv-bytes", "64MiB")
    ended = start(*command, program=("-c", SMALL_DISK)).end()
    assert ended.code == 2, ended.err
    assert re.fullmatch(rf"mqinfer: can't write {out}: File too large\. [^\n]+ again", ended.err.splitlines()[-1])
    assert "Traceback" not in ended.err
    assert 0 < len(rows(out)) < 60
    again = start(*command).end()
    assert again.code == 0, again.err
    assert sorted(row["custom_id"] for row in rows(out)) == sorted(f"id-{i}" for i in range(60))


def test_ctrl_c_while_the_model_is_read_ends_at_once(
    start: Callable[..., Process], prompts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    os.mkfifo(folder / "config.json")  # whoever reads it waits for ever
    batch = start("batch", prompts, "-o", tmp_path / "out.jsonl", "--model", folder)
    with (folder / "config.json").open("w"):  # returns when it is being read
        ended = batch.end(signal.SIGINT)
    assert (ended.code, ended.out, ended.err) == (130, "", "")


@contextlib.contextmanager
def silent_server() -> Iterator[socket.socket]:
    """Takes connections, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        yield server


@pytest.mark.parametrize(("command", "code"), [("status", 130), ("coordinator", 0), ("worker", 0), ("batch", 130)])
def test_ctrl_c_while_connecting_ends_at_once(
    start: Callable[..., Process], command: str, code: int, pipeline: Path, prompts: Path, tmp_path: Path
) -> None:
    more = {"worker": ["--stage", 0], "batch": [prompts, "-o", tmp_path / "out.jsonl"]}.get(command, [])
    with silent_server() as server:
        url = f"amqp://127.0.0.1:{server.getsockname()[1]}/"
        process = start(command, *more, "-p", pipeline, "--broker", url)
        connection, _ = server.accept()
        with connection:
            ended = process.end(signal.SIGINT)
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err


# In this process


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs a command as `mqinfer` does, in this process, which keeps its torch, its environment and its logs."""
    for name in list(os.environ):
        if name.startswith("MQINFER_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("mqinfer.tokenizer.hide_torch", lambda: None)
    monkeypatch.setattr(observe, "_sinks", [])
    monkeypatch.setattr(observe, "_quiet_libraries", lambda: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mqinfer", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        return Ended(int(caught.value.code or 0), out, err)

    return run


def commands() -> list[list[str]]:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    inner = {name: command for name, command in group.commands.items() if isinstance(command, TyperGroup)}
    plain = [[name] for name in group.commands if name not in inner]
    return plain + [[name, command] for name, group in inner.items() for command in group.commands]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_a_help_with_a_sentence_and_an_example(command: list[str]) -> None:
    shown = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "80"}, terminal_width=80)
    assert shown.exit_code == 0
    sentence = shown.output.splitlines()[2]
    assert re.fullmatch(r"  [A-Z].*[.:]", sentence)
    assert f"\n    mqinfer {' '.join(command)} " in shown.output
    options = shown.output.partition("Options:")[2]
    assert max(map(len, options.splitlines())) <= 80
    assert all("  " in line.strip() for line in options.splitlines() if line.startswith("  -")), (
        "an option without help"
    )


def test_the_first_help_lists_every_command_with_its_whole_sentence() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"], terminal_width=80)
    listed = shown.output.partition("Commands:")[2]
    assert "..." not in listed
    assert {command[0] for command in commands()} <= set(re.findall(r"^  (\w+)  ", listed, re.MULTILINE))


#: What a person may get wrong -> what they are told. `{}` are filled in by the test.
MISTAKES = {
    "batch nowhere.jsonl -o {out} --model {model}": "there is no file nowhere.jsonl",
    "batch {prompts} --model {model}": "say where the results go: either -o FILE or --detach",
    "batch {prompts} -o {out} --detach -p {pipeline}": "say where the results go: either -o FILE or --detach",
    "batch {prompts} -o {out}": "say which model: --model PATH_OR_ID, or --pipeline FILE (or --broker for a fleet)",
    "batch {prompts} -o {prompts} --model {model}": "has a line that is not a batch result",
    "batch {prompts} -o /nowhere/out --model {model}": "can't write /nowhere/out: No such file or directory",
    "batch {prompts} -o {out} --model {tmp}": "config.json can't be read: No such file or directory",
    "batch {prompts} -o {out} --model {strange}": "model type 'strange' is not verified; these are: apertus,",
    "batch {prompts} -o {out} --model {model} --stages 9": "4 layers can't be cut into 9 stages",
    "batch {prompts} -o {out} --model {model} --dtype float8": "dtype: 'float8' is not one of float32,",
    "batch {prompts} -o {out} --model {model} --device gpu": "'gpu' is no device: write cpu, cuda or",
    "batch {prompts} -o {out} --model {model} --kv-bytes 4Gxx": "setting kv_bytes: write a size such as 4GiB",
    "batch {prompts} -o {out} --model {model} --kv-bytes 1KiB": "--kv-bytes 1.0 KiB does not hold one row",
    "batch {prompts} -o {out} --model {model} --kv-bytes 999TiB": "not enough memory on cpu",
    "batch {prompts} -o {out} -p {pipeline} --stages 2": "leave out --stages and --dtype",
    "batch {prompts} -o {out} -p {other}": "has other weights or another config than the plan was made for",
    "batch {prompts} -o {out} -p {pipeline} --broker memory://x --stages 2": "for running here, not for a fleet",
    "autoscale -p {pipeline}": "say how to start and stop workers: --systemd, or --up and --down; or --dry-run",
    "autoscale -p {pipeline} --up true": "--up and --down go together",
    "autoscale -p {pipeline} --systemd --up true --down true": "either --systemd, or --up and --down",
    "autoscale -p {pipeline} --up {{gpu}} --down true": "the command for --up has {gpu}; there are {stage}, {n},",
    "autoscale -p {pipeline} --dry-run --min 5": "stage 0 can't have 5 consumers at least and 4 at most",
    "autoscale -p {pipeline} --dry-run --limits 9=1:2": "the plan has stages 0 to 1, not 9",
    "autoscale -p {pipeline} --dry-run --limits 1:2": "setting limits: write limits as STAGE=LEAST:MOST",
    "advise -p {pipeline} --window soon": "setting window_s: write a time such as 10s or 2m",
    "worker --stage 0": "give the plan's file with --pipeline (make one with `mqinfer plan`)",
    "worker --stage 0 -p nowhere.toml": "can't read the plan nowhere.toml: No such file or directory",
    "worker --stage 0 -p {tmp}": "Is a directory",
    "worker --stage 0 -p {broken}": "unknown key: stagse",
    "worker --stage 2 -p {pipeline}": "the plan has stages 0 to 1, not 2",
    "worker --stage 0 -p {pipeline} --broker memory://x --device gpu": "'gpu' is no device",
    "worker --stage 0 -p {pipeline} --codec zip": "setting codec: Input should be 'auto', 'raw', 'lossless', 'int8'",
    "worker --stage 0 -p {other} --broker memory://x": "has other weights or another config than the plan was made for",
    "worker --stage 0 -p {pipeline} --broker amqp://127.0.0.1:1/": "nothing listens at 127.0.0.1:1",
    "coordinator -p {pipeline} --broker amqp://127.0.0.1:1/": "nothing listens at 127.0.0.1:1",
    "results job-1 -o {out} --broker amqp://127.0.0.1:1/": "nothing listens at 127.0.0.1:1",
    "status -p {pipeline} --broker http://x/": "the broker's URL must begin with one of memory://, amqp://, amqps://",
    "status -p {pipeline} --broker amqp://": "the broker's URL can't be read; it looks like amqp://user:password@host",
    "status -p {pipeline} --config nowhere.toml": "can't read the settings file nowhere.toml",
    "status -p {pipeline} --config {typo}": "unknown key 'brokr', is it 'broker'?",
    "dead list": "give the plan's file with --pipeline",
    "dead show 1 -p {pipeline} --broker memory://x": "there is no dead letter 1: there are 0",
    "dead requeue -p {pipeline}": "say which: either a number of `mqinfer dead list` or --all",
    "dead purge 1 --all -p {pipeline}": "say which: either a number of `mqinfer dead list` or --all",
    "dead purge 1 --name x --yes --broker memory://x": "there is no dead letter 1: there are 0",
    "dead list --name Not_Good! --broker memory://x": "can't be a name",
    "plan {model}": "say either --stages N or --cut A,B,…",
    "plan {model} --cut 1,x": "--cut '1,x': write layer numbers such as 10,20",
    "plan {model} --cut 9": "they must rise, and lie between 1 and 3",
    "plan {model} --stages 2 --name Not_Good!": "can't be a name",
    "plan {model} --stages 2 -o /nowhere/p.toml": "can't write the plan /nowhere/p.toml",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_told_in_one_sentence_with_exit_code_2(
    command: str, say: Callable[..., Ended], model: Path, pipeline: Path, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "strange"}')
    (tmp_path / "broken.toml").write_text(pipeline.read_text().replace("stages =", "stagse = 1\nstages ="))
    (tmp_path / "other.toml").write_text(re.sub(r'(fingerprint = ").', r"\1x", pipeline.read_text()))
    (tmp_path / "typo.toml").write_text('brokr = "amqp://x/"\n')
    names = {"model": model, "pipeline": pipeline, "prompts": prompts, "tmp": tmp_path, "out": tmp_path / "out.jsonl"}
    files = {name: tmp_path / f"{name}.toml" for name in ("broken", "other", "typo")}
    before = prompts.read_bytes()
    ended = say(*(part.format(**names, **files, strange=tmp_path / "strange") for part in command.split()))
    assert ended.code == 2
    assert re.fullmatch(r"mqinfer: [^\n]+\n", ended.err)
    assert MISTAKES[command] in ended.err
    assert prompts.read_bytes() == before


def test_a_password_is_not_repeated(say: Callable[..., Ended], pipeline: Path) -> None:
    for url in ("amqp://u:secret@127.0.0.1:1/", "http://u:secret@x/", "amqp://u:secret@", "amqp://u:secret@[x/"):
        assert "secret" not in say("status", "-p", pipeline, "--broker", url).err


def test_with_a_broker_in_the_environment_batch_goes_to_the_fleet_unless_a_model_is_given(
    say: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    pipeline: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("MQINFER_BROKER", "amqp://127.0.0.1:1/")
    ended = say("batch", prompts, "-o", tmp_path / "out.jsonl", "-p", pipeline)
    assert ended.err == "mqinfer: nothing listens at 127.0.0.1:1\n"
    monkeypatch.setenv("MQINFER_PIPELINE", "nowhere.toml")
    ended = say("batch", prompts, "-o", tmp_path / "out.jsonl", "--model", model, "--kv-bytes", "1KiB")
    assert "does not hold one row" in ended.err


def test_the_clients_own_log_lines_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("aio_pika", "aiormq")
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in names}
    try:
        observe._quiet_libraries()
        for name in names:
            logging.getLogger(f"{name}.connection").error("error when creating transport")
    finally:
        for name, (handlers, propagate) in before.items():
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate
    assert capsys.readouterr().err == ""


def test_sizes_in_the_log_are_for_people_and_in_json_for_machines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "_quiet_libraries", lambda: None)
    for as_json in (False, True):
        monkeypatch.setattr(observe, "_sinks", [])
        observe.log_to_stderr(as_json=as_json)
        observe.emit(observe.STAGE_LOADED, weight_bytes=3 * 2**20, seconds=1.23456)
    people, machines = capsys.readouterr().err.splitlines()
    assert "weight_bytes='3.0 MiB' seconds=1.235" in people
    assert json.loads(machines)["weight_bytes"] == 3 * 2**20


# Over a broker


@pytest.mark.broker
def test_a_broker_s_refusal_is_told_in_one_sentence(say: Callable[..., Ended], amqp_url: str, pipeline: Path) -> None:
    ended = say("status", "-p", pipeline, "--broker", re.sub(r"//(.*?):.*?@", r"//\1:wrong@", amqp_url))
    assert ended.code == 2
    assert re.fullmatch(r"mqinfer: wrong user or password for the broker at [^\n]+\n", ended.err)
    ended = say("status", "-p", pipeline, "--broker", f"{amqp_url.rstrip('/')}/nowhere")
    assert ended.code == 2
    assert re.fullmatch(r"mqinfer: the vhost 'nowhere' does not exist at [^\n]+\n", ended.err)


@pytest.mark.broker
def test_queues_are_declared_seen_and_deleted_and_what_is_lost_is_asked_for(
    say: Callable[..., Ended], amqp_url: str, pipeline: Path, prompts: Path, tmp_path: Path
) -> None:
    where = ("-p", pipeline, "--broker", amqp_url)
    name = plans.read(pipeline).name
    assert say("queues", "delete", *where).err == "there are no such queues\n"
    assert say("status", *where).out.splitlines()[-1] == "no coordinator answers: start one with `mqinfer coordinator`"
    assert len(say("queues", "declare", *where).out.splitlines()) == 4
    detached = say("batch", prompts, "--detach", *where)
    assert detached.code == 0
    job = detached.out.strip()
    for verb in ("purge", "delete"):
        refused = say("queues", verb, *where)  # nobody is there to say yes
        assert refused.code == 1
        assert f"mqinfer.{name}.requests: 5 messages\nLose them? [y/N]:" in refused.err
    assert f"mqinfer.{name}.requests: purged, 5 messages lost" in say("queues", "purge", "--yes", *where).out
    deleted = say("queues", "delete", *where)
    assert (deleted.code, len(deleted.out.splitlines())) == (0, 4)
    left = say("results", job, "--no-wait", "-o", tmp_path / "out.jsonl", "--broker", amqp_url)
    assert (left.code, results(job).name) == (4, f"mqinfer.results.{job}")
    assert left.err == "0 answered, 0 failed of 5; the rest has not come yet: run the same command again\n"


def bury(amqp_url: str, topology: Topology, bodies: Sequence[tuple[bytes, str, str]]) -> None:
    async def publish() -> None:
        transport = await open_transport(amqp_url)
        for body, queue, reason in bodies:
            await publish_declared(transport, topology.dead, body, headers={"queue": queue, "reason": reason})
        await transport.close()

    asyncio.run(publish())


@pytest.mark.broker
def test_dead_letters_are_listed_shown_sent_back_and_purged(
    say: Callable[..., Ended], amqp_url: str, pipeline: Path
) -> None:
    where = ("-p", pipeline, "--broker", amqp_url)
    plan = plans.read(pipeline)
    topology = Topology(plan.name)
    assert say("dead", "list", *where).err == f"{plan.name}: no dead letters\n"
    assert say("queues", "declare", *where).code == 0
    request = Request(id="job.1", job="job", plan=plan.digest, prompt=(1, 2, 3), max_tokens=5)
    bury(
        amqp_url,
        topology,
        [
            (encode(request), topology.requests.name, "of another time"),
            (b"secret prompt", topology.stage(0).name, "not a body of mqinfer"),
            (b"more", f"mqinfer.{plan.name}.worker.s0-1", "no\x1b[31m [red]markup[/red]"),
        ],
    )
    listed = say("dead", "list", *where)
    assert listed.code == 0
    assert re.search(rf"^1 .* request +{re.escape(topology.requests.name)} +of another time", listed.out, re.MULTILINE)
    assert re.search(r"^2 +13 B +unreadable ", listed.out, re.MULTILINE)
    assert "[red]markup[/red]" in listed.out
    assert "\x1b" not in listed.out
    shown = say("dead", "show", 1, *where)
    assert "prompt tokens: 3\n" in shown.out
    assert "begins with: 93 4d 51 49 01 00" in shown.out
    assert "begins with: 73 65 63 72\n" in say("dead", "show", 2, "--name", plan.name, "--broker", amqp_url).out
    some = say("dead", "requeue", "--all", *where)
    assert (some.code, some.out) == (3, f"1 -> {topology.requests.name}\n2 -> {topology.stage(0).name}\n")
    assert some.err.startswith(f"3 stays: the queue mqinfer.{plan.name}.worker.s0-1 is gone with its worker")
    assert say("dead", "requeue", 2, *where).err == "mqinfer: there is no dead letter 2: there are 1\n"
    refused = say("dead", "purge", 1, *where)
    assert (refused.code, refused.err.partition(" [y/N]")[0]) == (1, "Lose dead letter 1?")
    assert say("dead", "purge", 1, "--yes", *where).out == f"{topology.dead.name}: 1 messages lost\n"
    assert say("dead", "purge", "--all", *where).out == f"{topology.dead.name}: 0 messages lost\n"
    assert say("queues", "delete", "--yes", *where).code == 0


@pytest.mark.broker
def test_a_fleet_of_processes_answers_is_stopped_and_goes_on(
    start: Callable[..., Process], amqp_url: str, pipeline: Path, tmp_path: Path
) -> None:
    where = ("-p", pipeline, "--broker", amqp_url)
    prompts, out = write_prompts(tmp_path / "p.jsonl", 120, max_tokens=40), tmp_path / "out.jsonl"
    workers = [start("worker", "--stage", stage, *where, "--kv-bytes", "64MiB", "--threads", 1) for stage in (0, 1)]
    fleet = [*workers, start("coordinator", *where, "--rows", 16)]
    batch = start("batch", prompts, "-o", out, *where)
    batch.until(lambda: out.exists() and out.stat().st_size > 0)
    shown = start("status", *where).end()
    assert shown.code == 0
    assert re.search(r"^stage 1 +\d+ +\d+ +1 ", shown.out, re.MULTILINE)
    ended = batch.end(signal.SIGINT)
    assert ended.code == 130, ended.err
    assert "Run the same command again to go on." in ended.err
    again = start("batch", prompts, "-o", out, *where).end()
    assert (again.code, again.err.splitlines()[-1]) == (0, f"done: 120 answered, 0 failed -> {out}")
    assert sorted(row["custom_id"] for row in rows(out)) == sorted(f"id-{i}" for i in range(120))
    for actor in fleet:
        left = actor.end(signal.SIGTERM)
        assert left.code == 0, left.err
        assert "drained" in left.err
        assert "Traceback" not in left.err
    assert "weight_bytes=" in workers[0].end().err
    assert start("queues", "delete", "--yes", *where).end().code == 0
