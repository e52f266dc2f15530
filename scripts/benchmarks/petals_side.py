"""Petals' side of the comparison; runs in Petals' own environment (docs/performance.md says how that is made).

Two servers on loopback, each with half of the layers and as many threads as OMP_NUM_THREADS says, and a client that
generates. Nothing of mqinfer or of `benchmarks` is imported here, since the environment has neither. `rival_petals`
starts it and asks it in lines of JSON, as `benchmarks.side` has them.

    petals_side.py client MODEL DTYPE                   the whole swarm
    petals_side.py serve MODEL DTYPE FIRST:END [PEER]   what it starts twice; its only line out: {"address": …}
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

#: Names the swarm's keys; the underscore keeps it out of the list of public models.
PREFIX = "_mqinfer-bench"
#: Keys and values that a server can hold: Petals reserves rows x greatest length for every open session.
CACHE_TOKENS = 65_536
START_S = 240.0
#: More retries than that and it would wait for a dead server for ever, as it does by default.
MOST_TRIES = 2
#: No port mapping, no relays, no look from outside: nothing leaves this machine.
LOOPBACK: dict[str, Any] = {"nat_port_map": False, "auto_nat": False, "use_relay": False, "use_auto_relay": False}


def mend_hivemind() -> None:
    """Put back the names that Petals 2.2 takes from hivemind's top module and hivemind 1.1.12 no longer has there.

    The hivemind that Petals asks for (1.1.10.post2) downloads a program while it installs; 1.1.12 brings it along.
    """
    hivemind = importlib.import_module("hivemind")
    homes = (
        "utils",
        "utils.asyncio",
        "utils.nested",
        "utils.tensor_descr",
        "utils.timed_storage",
        "compression",
        "p2p",
    )
    for home in homes:
        for name, value in vars(importlib.import_module(f"hivemind.{home}")).items():
            if not name.startswith("_") and not hasattr(hivemind, name):
                setattr(hivemind, name, value)


def serve(out: TextIO, model: str, dtype: str, layers: str, peer: str | None) -> None:
    """Serve the layers until killed."""
    from petals.server.server import Server

    server = Server(
        initial_peers=[peer] if peer else [],
        dht_prefix=PREFIX,
        converted_model_name_or_path=model,
        block_indices=layers,
        torch_dtype=dtype,
        device="cpu",
        throughput=1.0,  # as announced to clients that could choose; measuring it asks a server on the internet
        attn_cache_tokens=CACHE_TOKENS,
        num_handlers=2,  # processes that answer calls; the default of 8 is meant for more than one core
        reachable_via_relay=False,
        skip_reachability_check=True,
        host_maddrs=["/ip4/127.0.0.1/tcp/0"],
        **LOOPBACK,
    )
    say(out, {"address": str(server.dht.get_visible_maddrs()[0])})
    server.run()


def say(out: TextIO, answer: dict[str, Any]) -> None:
    """One line to who started this process."""
    out.write(json.dumps(answer) + "\n")
    out.flush()


def start_server(model: str, dtype: str, layers: str, peer: str | None) -> tuple[subprocess.Popen[str], str]:
    """A server process and its address."""
    command = [sys.executable, __file__, "serve", model, dtype, layers, *([peer] if peer else [])]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise RuntimeError(f"the server of layers {layers} ended with code {process.wait()} before it had an address")
    return process, json.loads(line)["address"]


class Client:
    """Two servers and the part of the model that Petals leaves to its client: embeddings, last norm, head."""

    def __init__(self, model: str, dtype: str) -> None:
        import torch
        from petals import AutoDistributedModelForCausalLM
        from petals.client.routing import sequence_manager

        sequence_manager.DHT = _loopback(sequence_manager.DHT)
        torch.set_grad_enabled(False)
        layers = int(json.loads(Path(model, "config.json").read_text())["num_hidden_layers"])
        first, peer = start_server(model, dtype, f"0:{layers // 2}", None)
        second, _ = start_server(model, dtype, f"{layers // 2}:{layers}", peer)
        for server in (first, second):
            threading.Thread(target=_end_with, args=(server,), daemon=True).start()
        self.torch = torch
        self.model = AutoDistributedModelForCausalLM.from_pretrained(
            model,
            initial_peers=[peer],
            dht_prefix=PREFIX,
            torch_dtype=getattr(torch, dtype),
            max_retries=MOST_TRIES,
            show_route=False,
        )
        self._await_layers()
        # A session that is collected closes itself, which waits for the event loop's thread: for ever, where the
        # collector happens to run in that one. `obey` collects between one question and the next. Not earlier, or the
        # processes that hivemind forks would have no collector.
        gc.disable()

    def _await_layers(self) -> None:
        from petals.data_structures import ServerState
        from petals.utils.dht import get_remote_module_infos

        manager = self.model.transformer.h.sequence_manager
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            found = get_remote_module_infos(manager.dht, manager.block_uids, latest=True)
            if all(any(s.state == ServerState.ONLINE for s in layer.servers.values()) for layer in found):
                return
            time.sleep(0.5)
        raise RuntimeError(f"the servers did not announce all layers within {START_S:.0f} s")

    def generate(
        self, prompts: list[list[int]], output_tokens: list[int], batch: int, sessions: int
    ) -> list[list[int]]:
        """The new tokens of each prompt, exactly as many as asked for, greedy.

        batch: rows in one session, taken from the prompts in the order given. sessions: how many are open at once.
        """
        groups = [range(at, min(at + batch, len(prompts))) for at in range(0, len(prompts), batch)]

        def run(rows: range) -> list[list[int]]:
            self.torch.set_grad_enabled(False)  # a thread begins with it on
            return self._session([prompts[i] for i in rows], [output_tokens[i] for i in rows])

        with ThreadPoolExecutor(sessions) as pool:
            return [tokens for group in pool.map(run, groups) for tokens in group]

    def _session(self, prompts: list[list[int]], output_tokens: list[int]) -> list[list[int]]:
        """One batch, until its longest row ends.

        Petals takes no attention mask, so rows of unlike length can't be batched rightly. Shorter prompts are filled up
        on the left with their own first token, which is then computed like any other: the work is that of a padded
        batch, the text of those rows is not the model's own.
        """
        torch, longest, steps = self.torch, max(map(len, prompts)), max(output_tokens)
        ids = torch.tensor([[p[0]] * (longest - len(p)) + p for p in prompts])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False, eos_token_id=None
        )
        if out.shape != (len(prompts), longest + steps):
            raise RuntimeError(f"asked for {steps} tokens after {longest}, got {tuple(out.shape)}")
        return [row[longest : longest + n] for row, n in zip(out.tolist(), output_tokens, strict=True)]

    def score(self, prompts: list[list[int]]) -> list[list[int]]:
        """The token after each prompt; prompts of one length.

        Petals itself cuts the batch into calls of 1,024 tokens, all under way at once. The head runs over the last
        positions only.
        """
        if len(set(map(len, prompts))) != 1:
            raise ValueError("Petals takes no attention mask: prompts of unlike length can't be scored together")
        hidden = self.model.model(self.torch.tensor(prompts)).last_hidden_state
        drawn: list[list[int]] = self.model.lm_head(hidden[:, -1]).argmax(-1, keepdim=True).tolist()
        return drawn


def _end_with(server: subprocess.Popen[str]) -> None:
    """Petals would try to reach a dead server for minutes, and then for ever."""
    code = server.wait()
    print(f"a server ended with code {code}", file=sys.stderr, flush=True)
    end_all()


def _loopback(dht: type) -> type:
    """hivemind's DHT with LOOPBACK as its defaults, for the client that Petals makes itself."""

    class LoopbackDHT(dht):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**LOOPBACK, **options})

    return LoopbackDHT


def end_all(*_: Any) -> None:
    """Kill this process, the servers and their daemons: rival_petals made them a group of their own."""
    os.killpg(0, signal.SIGKILL)


def orders(source: TextIO) -> queue.Queue[str]:
    """What is asked for, line by line. Once the other side is gone everything here is killed, busy or not."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in source:
            lines.put(line)
        end_all()

    threading.Thread(target=read, daemon=True).start()
    return lines


def obey(source: TextIO, out: TextIO, model: str, dtype: str) -> None:
    """Do what is asked until the other side is gone; the first of it is to start the swarm."""
    waiting = orders(source)
    client: Client | None = None
    while True:
        order = json.loads(waiting.get())
        op = order.pop("op")
        if client is None or op == "start":
            client = started(out, model, dtype)
            continue
        work: Callable[..., list[list[int]]] = client.generate if op == "generate" else client.score
        gc.collect()
        began_s = time.perf_counter()
        outputs = work(**order)
        say(out, {"seconds": time.perf_counter() - began_s, "outputs": outputs})


def started(out: TextIO, model: str, dtype: str) -> Client | None:
    """The client of a swarm that works; None, and why, where there can be none here."""
    try:
        mend_hivemind()
        client = Client(model, dtype)
    except Exception as error:  # whatever an environment that does not fit brings forth
        say(out, {"unavailable": f"Petals does not start: {error!r}"})
        return None
    say(out, {})
    return client


@contextmanager
def own_streams() -> Iterator[tuple[TextIO, TextIO]]:
    """Where orders come from and answers go, out of the libraries' way: what they print goes to standard error, and the
    processes that they fork close standard input, for ever where a thread is reading it.
    """
    source, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    yield source, answers


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    role, model, dtype, *rest = arguments
    with own_streams() as (source, answers):
        if role == "serve":
            mend_hivemind()
            serve(answers, model, dtype, rest[0], rest[1] if rest[1:] else None)
            return
        signal.signal(signal.SIGTERM, end_all)
        try:
            obey(source, answers, model, dtype)
        except BaseException:
            traceback.print_exc()
            end_all()


if __name__ == "__main__":
    main(sys.argv[1:])
