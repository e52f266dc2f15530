"""`mqinfer profile`, `plan --fleet` and `plan --profile` as people meet them, with a tiny random model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from families import Tiny, save

from mqinfer import cli, fleet_commands, host_profile, observe
from mqinfer import plan as plans
from mqinfer.checkpoint import facts
from mqinfer.host_profile import HostProfile


class Ended(NamedTuple):
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs a command in this process, which keeps its torch, its environment and its logs."""
    for name in [name for name in os.environ if name.startswith("MQINFER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("mqinfer.tokenizer.hide_torch", lambda: None)
    monkeypatch.setattr(observe, "_sinks", [])
    monkeypatch.setattr(observe, "_quiet_libraries", lambda: None)

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mqinfer", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        shown = capsys.readouterr()
        return Ended(int(caught.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(Tiny(family="llama"), folder)
    return folder


def profile_of(model: Path, **changes: object) -> HostProfile:
    """Layers of 1 ms, a head of 2."""
    known = {
        "host": "h",
        "device": "cpu",
        "threads": 1,
        "model": str(model),
        "fingerprint": facts(str(model)).fingerprint,
        "dtype": "float32",
        "memory_bytes": 2**30,
        "context_tokens": 64,
        "prefill_tokens": 64,
        "layers": 2,
        "forward": ((1, 0.0),),
        "layer": ((1, 0.001), (32, 0.032)),
        "head": ((1, 0.002), (32, 0.064)),
        "embedding": ((1, 0.0),),
        "layer_prefill_token_s": 0.0,
    }
    return HostProfile(**{**known, **changes})


def machine(name: str, rest: str) -> str:
    return f'[[machine]]\nname = "{name}"\n{rest}\n'


@pytest.fixture
def fleet(model: Path, tmp_path: Path) -> Path:
    """Two machines that hold a part of the layers each."""
    host_profile.write(profile_of(model), tmp_path / "host.toml")
    weight = facts(str(model)).anatomy.layers[0].parameters * 4
    room = 64 * 8 * 2**10 + 3 * weight + 2**22
    path = tmp_path / "fleet.toml"
    path.write_text(machine("box", f'count = 2\nprofile = "host.toml"\nmemory = "{room}"'))
    return path


WHERE = ("--context", 64, "--prompt-tokens", 0, "--concurrency", 8)


def test_a_fleet_gets_a_plan_a_table_and_the_commands_that_start_it(
    say: Callable[..., Ended], model: Path, fleet: Path, tmp_path: Path
) -> None:
    path, script = tmp_path / "p.toml", tmp_path / "start.sh"
    ended = say("plan", model, "--fleet", fleet, *WHERE, "-o", path, "--commands", script)
    assert ended.code == 0, ended.err
    plan = plans.read(path)
    assert plan.stages[-1].end == 4
    assert re.search(
        r"predicted: \d+\.\d tokens/s, bound at stage \d, with 8 rows in flight of 64 positions", ended.out
    )
    assert re.search(r"one more box: \d+\.\d tokens/s \(\+\d+%\)", ended.out)
    assert "mqinfer worker" not in ended.out
    text = script.read_text()
    workers = re.findall(
        r"^mqinfer worker -p (\S+) --stage (\d) --device cpu --kv-bytes \d+ --threads 1$", text, re.MULTILINE
    )
    assert workers
    assert {int(stage) for _, stage in workers} == set(range(len(plan.stages)))
    assert {name for name, _ in workers} == {str(path)}
    for number, (_, stage) in enumerate(workers, 1):
        assert f"\n#   systemctl enable --now mqinfer.target mqinfer-worker@{stage}-box-{number}\n" in text
    assert "\n#   printf 'MQINFER_ROWS=%s\\n' 8 > /etc/mqinfer/coordinator.env\n" in text
    assert "\n#   systemctl enable --now mqinfer.target mqinfer-coordinator\n" in text
    assert text.count(f"\n#   install -m 644 {path} /etc/mqinfer/pipeline.toml\n") == 1 + len(workers)
    assert text.count("MQINFER_DEVICE=%s\\nMQINFER_KV_BYTES=%s\\nMQINFER_THREADS=%s\\n' cpu ") == len(workers)
    as_services = re.sub("^#   ", "", text, flags=re.MULTILINE)
    for commands in (text, as_services):
        assert subprocess.run(["sh", "-n"], input=commands, text=True, check=False).returncode == 0


def test_a_plan_is_shown_and_written_before_one_more_machine_is_planned_for(
    say: Callable[..., Ended], model: Path, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Iterator[float]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(fleet_commands.fleet_growth, "one_more", interrupted)
    ended = say("plan", model, "--fleet", fleet, *WHERE, "-o", tmp_path / "p.toml", "--commands", tmp_path / "x.sh")
    assert ended.code == 130
    assert "predicted: " in ended.out
    assert plans.read(tmp_path / "p.toml").stages[-1].end == 4
    assert (tmp_path / "x.sh").exists()


def test_without_a_file_for_them_the_commands_are_printed(say: Callable[..., Ended], model: Path, fleet: Path) -> None:
    ended = say("plan", model, "--fleet", fleet, *WHERE)
    assert "mqinfer worker -p pipeline.toml --stage 0" in ended.out
    assert "nothing was written" in ended.err


def test_a_worker_has_all_threads_where_its_profile_had(
    say: Callable[..., Ended], model: Path, fleet: Path, tmp_path: Path
) -> None:
    host_profile.write(profile_of(model, threads=0), tmp_path / "host.toml")
    out = say("plan", model, "--fleet", fleet, *WHERE).out
    assert "mqinfer worker -p pipeline.toml" in out
    assert "threads" not in out.lower()


def test_the_assignment_is_there_for_machines_too(say: Callable[..., Ended], model: Path, fleet: Path) -> None:
    told = json.loads(say("plan", model, "--fleet", fleet, *WHERE, "--json").out)
    assert told["stages"][0]["first"] == 0
    assert told["tokens_per_s"] == min(stage["tokens_per_s"] for stage in told["stages"])
    assert told["one_more_tokens_per_s"]["box"] >= told["tokens_per_s"]
    served = sum(worker["count"] for stage in told["stages"] for worker in stage["workers"])
    assert served + told["idle"]["box"] == 2


def test_known_gpus_are_estimated_and_said_to_be(say: Callable[..., Ended], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(machine("new", 'gpu = "A100-80GB"') + machine("old", 'gpu = "T4"\ncount = 3'))
    ended = say("plan", model, "--fleet", path, *WHERE)
    assert ended.code == 0, ended.err
    assert "estimated by peak figures, which may be far off: new, old" in ended.err
    assert "--device cuda " in ended.out


@pytest.mark.parametrize(("profiled", "told"), [(16, True), (28, False)])
def test_a_profile_of_rows_much_shorter_than_planned_for_is_told(
    profiled: int, told: bool, say: Callable[..., Ended], model: Path, fleet: Path, tmp_path: Path
) -> None:
    host_profile.write(profile_of(model, context_tokens=profiled), tmp_path / "host.toml")
    ended = say("plan", model, "--fleet", fleet, "--context", 64, "--prompt-tokens", 48, "--concurrency", 8)
    assert ended.code == 0, ended.err
    sentence = "rows decode at position 56 on average, but box was profiled at 16: it will be slower than predicted; "
    assert (sentence + "run mqinfer profile --context 56" in ended.err) == told


def test_a_fleet_that_is_too_small_is_short_by_so_many_bytes(
    say: Callable[..., Ended], model: Path, fleet: Path
) -> None:
    fleet.write_text(fleet.read_text().replace("count = 2", "count = 1").replace("memory = ", 'memory = "1KiB" #'))
    ended = say("plan", model, "--fleet", fleet, *WHERE)
    assert ended.code == 2
    assert re.fullmatch(r"mqinfer: the fleet is short by [\d,]+ bytes \([^\n]+\n", ended.err)


def test_a_profile_decides_how_much_the_head_weighs(say: Callable[..., Ended], model: Path, tmp_path: Path) -> None:
    for head_s, stages in ((0.0, [(0, 2), (2, 4)]), (1.0, [(0, 3), (3, 4)])):
        host_profile.write(profile_of(model, head=((1, head_s),)), tmp_path / "host.toml")
        path = tmp_path / "p.toml"
        ended = say("plan", model, "--stages", 2, "--profile", tmp_path / "host.toml", "-o", path)
        assert ended.code == 0, ended.err
        assert [(stage.first, stage.end) for stage in plans.read(path).stages] == stages


def test_a_profile_that_was_measured_here_is_enough_to_plan_with(
    say: Callable[..., Ended], model: Path, tmp_path: Path
) -> None:
    ended = say("profile", "--model", model, "--context", 16, "--threads", 1, "-o", tmp_path / "host.toml")
    assert ended.code == 0, ended.err
    assert "the link to a broker was not measured: give --broker" in ended.err
    assert "milliseconds" in ended.out
    (tmp_path / "fleet.toml").write_text(machine("here", 'profile = "host.toml"'))
    assert say("plan", model, "--fleet", tmp_path / "fleet.toml", *WHERE).code == 0


def test_a_profile_has_the_link_where_a_broker_is_given(say: Callable[..., Ended], model: Path, tmp_path: Path) -> None:
    where = ("--context", 16, "--threads", 1, "-o", tmp_path / "host.toml")
    ended = say("profile", "--model", model, *where, "--broker", "memory://profile")
    assert ended.code == 0, ended.err
    assert host_profile.read(tmp_path / "host.toml").link is not None


#: What a fleet's file says -> what is told. `{host}` is a good profile.
WRONG = {
    "": "machine: missing",
    "machine = []": "machine: there is none",
    "machine = [3]": "machine: 3 is not a table: write [[machine]]",
    machine("a", ""): "machine a: give it either a profile or a gpu",
    machine("a", 'gpu = "T4"\nprofile = "host.toml"'): "machine a: give it either a profile or a gpu",
    machine(
        "a", 'gpu = "A100"'
    ): "machine a: gpu: 'A100' is not known, is it 'A100-80GB' or 'A100-40GB'? Known are: H200, ",
    machine("a", 'gpu = "T4"\ncuont = 2'): "machine a: unknown key: cuont",
    machine("a", 'gpu = "T4"\ncount = 0'): "machine a: its count is 0",
    machine("a", 'gpu = "T4"\ncount = 1000000000'): "machine: they are 1000000000 in all, more than the 1000",
    machine("a", 'gpu = "T4"\ncount = 500')
    + machine("b", 'gpu = "T4"\ncount = 501'): "machine: they are 1001 in all, more than the 1000 that are planned for",
    machine("a", 'gpu = "T4"\nmemory = "4Gxx"'): "machine a: memory: '4Gxx': write a size such as 4GiB",
    machine("a", 'gpu = "T4"') * 2: "machine: a name is there twice: ['a', 'a']",
    machine("a-b", 'gpu = "T4"'): "machine 1: name: 'a-b' can't be a part of a unit's name",
    machine("a", 'gpu = "T4"') + "[[machine]]\ncount = 2": "machine 2: name: missing",
    machine("gpu4090", 'gpu = "T4"'): "name: 'gpu4090' would be taken for the worker's device: write another one",
    machine("cpu", 'gpu = "T4"'): "name: 'cpu' would be taken for the worker's device",
    machine("a" * 101, 'gpu = "T4"'): "can't be a part of a unit's name: at most 100 letters, digits, '_' and '.'",
    machine("a", 'profile = "none.toml"'): "can't read the profile",
    machine("a", r'profile = "a\u0000b"'): r"a\x00b': embedded null byte",
    machine("a", 'gpu = "T4"\nmemory = "0"'): "machine a: memory: '0' is none",
    machine("a", f'gpu = "T4"\nmemory = "{10**40}"'): "memory: more than a machine can have",
    "machine = " + "[" * 3000: "not TOML: its brackets are nested too deeply",
    machine("a", "count = 1" + "0" * 5000): "not TOML: ",
    machine("a", 'gpu = "T4"\ndtype = "x"'): "machine a: unknown key: dtype",
    machine("a", 'profile = "other.toml"'): "was measured with another model",
    machine("a", 'profile = "half.toml"'): "was measured in bfloat16, not in float32",
    machine("a", 'profile = "unknown.toml"'): "machine a: its profile does not know the memory",
    machine("a", 'profile = "shell.toml"'): r"device: 'cpu\ntouch PWNED #' is no device: write cpu, cuda or",
    machine("a", 'profile = "host.toml"\ndevice = "cuda:1; reboot"'): "device: 'cuda:1; reboot' is no device",
    machine("a", 'gpu = "T4"\ndevice = "gpu"'): "device: 'gpu' is no device",
    machine("a", 'gpu = "T4"\ndevice = ""'): "device: '' is no device",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_in_a_fleet_s_file_is_said_in_a_sentence(
    text: str, say: Callable[..., Ended], model: Path, tmp_path: Path
) -> None:
    host_profile.write(profile_of(model), tmp_path / "host.toml")
    host_profile.write(profile_of(model, fingerprint="x"), tmp_path / "other.toml")
    host_profile.write(profile_of(model, dtype="bfloat16"), tmp_path / "half.toml")
    host_profile.write(profile_of(model, memory_bytes=0), tmp_path / "unknown.toml")
    host_profile.write(profile_of(model, device="cpu\ntouch PWNED #"), tmp_path / "shell.toml")
    (tmp_path / "fleet.toml").write_text(text)
    ended = say("plan", model, "--fleet", tmp_path / "fleet.toml")
    assert ended.code == 2
    assert re.fullmatch(r"mqinfer: [^\n]+\n", ended.err)
    assert WRONG[text] in ended.err


def test_a_plan_s_file_can_not_end_a_comment_of_the_commands(
    say: Callable[..., Ended], model: Path, fleet: Path, tmp_path: Path
) -> None:
    ended = say(
        "plan", model, "--fleet", fleet, *WHERE, "-o", tmp_path / "a\ntouch PWNED", "--commands", tmp_path / "s"
    )
    assert ended.code == 2
    assert "--output: a file with unprintable characters in its name can't stand in the commands" in ended.err
    assert [path.name for path in tmp_path.iterdir() if path.name == "s" or "PWNED" in path.name] == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("plan {model} --stages 2 --concurrency 3 --json", "--concurrency, --json: only with --fleet FILE"),
        ("plan {model} --stages 2 --fleet {fleet}", "--fleet chooses the stages: leave out --stages, --cut and"),
        ("plan {model} --fleet nowhere.toml", "can't read the fleet nowhere.toml: No such file or directory"),
        ("plan {model} --fleet {fleet} --commands x.sh", "--commands: they start a plan's file, so give -o too"),
        ("plan {model} --fleet {fleet} --context 9999", "--context 9999: the model was made for 256 positions"),
        ("plan {model} --fleet {fleet} --context 8 --prompt-tokens 8", "a row has 8 positions in all"),
        ("plan {model} --fleet {fleet} --concurrency 65536", "--concurrency 65536: a coordinator takes 65535 rows at"),
        ("plan {model} --fleet {fleet} --dtype float8", "dtype: 'float8' is not one of float32,"),
        ("plan {model} --stages 2 --profile nowhere.toml", "can't read the profile nowhere.toml"),
        ("profile --model {model} -o {out} --context 256", "--context 256: it must be less than the model's 256"),
        ("profile --model {model} -o {out} --layers 3", "layers: 3 is not between 2 and 2"),
        ("profile --model {model} -o {out} --device gpu", "'gpu' is no device"),
        ("profile --model {model} -o {out} --broker amqp://127.0.0.1:1/", "nothing listens at 127.0.0.1:1"),
        ("profile --model {model} -o /nowhere/x.toml --context 8", "can't write the profile /nowhere/x.toml"),
    ],
)
def test_a_mistake_is_told_in_one_sentence_with_exit_code_2(
    command: str, said: str, say: Callable[..., Ended], model: Path, fleet: Path, tmp_path: Path
) -> None:
    names = {"model": model, "fleet": fleet, "out": tmp_path / "out.toml"}
    ended = say(*(part.format(**names) for part in command.split()))
    assert ended.code == 2
    assert re.fullmatch(r"mqinfer: [^\n]+", ended.err.strip().splitlines()[-1])
    assert said in ended.err
