"""An actor of mqinfer with a clock around the parts of a step: `python -m benchmarks.profiled_actor FILE worker …`.

Behind FILE come the arguments of `mqinfer worker` or `mqinfer coordinator`. FILE gets a line of JSON for each step that
is received, computed and sent, with times of the machine's monotonic clock, which all processes share. Nothing in
mqinfer knows of it: what is timed is found by its name, and where a name is gone this ends with an AttributeError.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

from mqinfer.messages import Step, StepDone
from mqinfer.plan import read

#: What `perf_counter` is on Linux.
now_s = time.perf_counter

Function = Callable[..., Any]
#: Which trip of which microbatch, and where it goes: a stage, or -1 for the coordinator.
Key = dict[str, int]


def key_of(message: object) -> Key | None:
    """None where it is no step."""
    if isinstance(message, Step):
        return {"microbatch": message.microbatch, "number": message.number, "to": message.stage}
    if isinstance(message, StepDone):
        return {"microbatch": message.microbatch, "number": message.number, "to": -1}
    return None


class Recorder:
    """Lines of the file, from any thread."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, what: str, key: Key, **fields: Any) -> None:
        """One line, written at once."""
        os.write(self._file, json.dumps({"what": what, **key, **fields}).encode() + b"\n")


def wrap(owner: object, name: str, wrapper: Callable[[Function], Function]) -> None:
    """Put what `wrapper` makes of a function in its place."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(wrapper(original)))


# -- the wire ----------------------------------------------------------------------------------------


class Wire:
    """When bodies arrived and left; they are told apart by where they lie in memory, for as long as they are held."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._arrived_s: dict[int, float] = {}
        self._leaving: dict[int, Key] = {}

    def tap(self, reader: Any, writer: Any) -> None:
        """`reader` and `writer`: the modules of the actor that call `decode` and `encode`."""
        rabbitmq = importlib.import_module("mqinfer.transports.rabbitmq")
        wrap(rabbitmq.RabbitmqDelivery, "__init__", self._delivery)
        wrap(rabbitmq.RabbitmqTransport, "publish", self._publish)
        wrap(reader, "decode", self._decode)
        wrap(writer, "encode", self._encode)

    def _delivery(self, original: Function) -> Function:
        def delivery(this: Any, *arguments: Any) -> None:
            original(this, *arguments)
            self._arrived_s[id(this.body)] = now_s()

        return delivery

    def _decode(self, original: Function) -> Function:
        def decode(body: bytes, **limits: Any) -> object:
            began_s = now_s()
            arrived_s = self._arrived_s.pop(id(body), began_s)
            message: object = original(body, **limits)
            if key := key_of(message):
                self._recorder.write("received", key, arrived_s=arrived_s, decoding_s=now_s() - began_s)
            return message

        return decode

    def _encode(self, original: Function) -> Function:
        def encode(message: object) -> bytes:
            body: bytes = original(message)
            if key := key_of(message):
                self._leaving[id(body)] = key
            return body

        return encode

    def _publish(self, original: Function) -> Function:
        async def publish(this: Any, queue: str, body: bytes, **how: Any) -> None:
            if key := self._leaving.pop(id(body), None):
                self._recorder.write("sent", key, at_s=now_s())
            sending: Awaitable[None] = original(this, queue, body, **how)
            await sending

        return publish


# -- compute -----------------------------------------------------------------------------------------


class Compute:
    """Seconds of a forward's parts; lives in the compute thread."""

    def __init__(self, recorder: Recorder, vocab_size: int) -> None:
        self._recorder = recorder
        self._vocab_size = vocab_size
        self._spent_s: defaultdict[str, float] = defaultdict(float)

    def tap(self) -> None:
        """Before anything is loaded."""
        stage_compute = importlib.import_module("mqinfer.stage_compute")
        attention = importlib.import_module("mqinfer.attention")
        sampler = importlib.import_module("mqinfer.sampler")
        transformers = importlib.import_module("transformers")
        wrap(stage_compute.StageCompute, "run", self._run)
        for owner, name, part in (
            (stage_compute, "unpack", "unpack"),
            (stage_compute, "pack", "pack"),
            (stage_compute, "encode", "pack"),
            (sampler.Sampler, "sample", "sampling"),
            (attention, "scaled_dot_product_attention", "kernel"),
        ):
            wrap(owner, name, functools.partial(self._timed, part))
        attend = self._timed("attention", attention.ragged_attention)
        transformers.AttentionInterface.register(attention.RAGGED, attend)
        for linear in _linears():
            wrap(linear, "forward", self._linear)

    def _run(self, original: Function) -> Function:
        def run(this: Any, steps: list[Step], *arguments: Any) -> object:
            self._spent_s.clear()
            began_s = now_s()
            out: object = original(this, steps, *arguments)
            ended_s = now_s()
            for step in steps:
                self._recorder.write(
                    "computed",
                    {"microbatch": step.microbatch, "number": step.number, "to": step.stage},
                    steps=len(steps),
                    rows=len(step.rows),
                    tokens=sum(row.count for row in step.rows),
                    began_s=began_s,
                    ended_s=ended_s,
                    spent_s=self._spent_s,
                )
            return out

        return run

    def _timed(self, part: str, original: Function) -> Function:
        def timed(*arguments: Any, **named: Any) -> Any:
            began_s = now_s()
            try:
                return original(*arguments, **named)
            finally:
                self._spent_s[part] += now_s() - began_s

        return timed

    def _linear(self, original: Function) -> Function:
        head, layer = self._timed("head", original), self._timed("gemm", original)

        def forward(this: Any, *arguments: Any, **named: Any) -> Any:
            return (head if this.out_features == self._vocab_size else layer)(this, *arguments, **named)

        return forward


def _linears() -> list[type]:
    """The classes of linear layers: PyTorch's and mqinfer's own."""
    nn = importlib.import_module("torch.nn")
    found, left = [], [nn.Module]
    while left:
        kind = left.pop()
        left += kind.__subclasses__()
        if kind is nn.Linear or ("Linear" in kind.__name__ and kind.__module__.startswith("mqinfer.")):
            found.append(kind)
    return found


def main() -> None:
    """See the module's docstring."""
    path, *arguments = sys.argv[1:]
    recorder = Recorder(path)
    wire = Wire(recorder)
    if arguments[0] == "coordinator":
        coordinator = importlib.import_module("mqinfer.coordinator")
        wire.tap(coordinator, coordinator)
    else:
        plan = read(arguments[arguments.index("--pipeline") + 1])
        worker, compute = map(importlib.import_module, ("mqinfer.stage_worker", "mqinfer.stage_compute"))
        wire.tap(worker, compute)
        importlib.import_module("mqinfer.stage_model")
        Compute(recorder, plan.vocab_size).tap()
    cli = importlib.import_module("mqinfer.cli")
    sys.argv = ["mqinfer", *arguments]
    cli.main()


if __name__ == "__main__":
    main()
