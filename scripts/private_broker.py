"""A RabbitMQ node of our own: on loopback, in a private folder, gone without a trace when its owner goes.

`scripts/broker` runs it for people, tests/broker.py for tests. Standard library only, because it must work before the
virtual environment does. It is no part of the product; nothing of mqinfer may be imported here.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0
CTL_TIMEOUT_S = 60.0

#: Debian's /usr/sbin/rabbitmq-server insists on root or the user rabbitmq; the script behind it does not.
DEBIAN_SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")

#: Waits until its owner closes the pipe or dies, even by SIGKILL; then ends what still runs and removes the folder.
JANITOR = """
cat >/dev/null
for file in "$1"/*.pid; do [ -f "$file" ] && kill -s KILL -- -"$(cat "$file")" 2>/dev/null; done
rm -rf "$1" || { sleep 1; rm -rf "$1"; }
"""


class BrokerFailed(Exception):
    """The node can't be started."""


def find_server() -> str | None:
    """The program that runs a RabbitMQ node, if it is installed together with Erlang's epmd."""
    server = str(DEBIAN_SERVER) if DEBIAN_SERVER.exists() else shutil.which("rabbitmq-server")
    return server if shutil.which("epmd") else None


class PrivateBroker:
    """A node with its own data, port, cookie and name server. `stop` or `kill` and `start` again keep data and port.

    Every process leads a group whose number stands in a file of the folder, where the janitor finds it.
    """

    def __init__(self, *, config: str = "", advanced: str = "") -> None:
        """`config`: more lines of rabbitmq.conf; `advanced`: advanced.config, for what rabbitmq.conf has no key for."""
        self._config = config
        self._advanced = advanced or "[]."
        self._folder = Path(tempfile.mkdtemp(prefix="mqinfer-broker-"))
        # Left to Erlang, a start on a busy machine was seen to end because its cookie was not hidden yet.
        cookie = os.open(self._folder / ".erlang.cookie", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
        os.write(cookie, secrets.token_hex(16).encode())
        os.close(cookie)
        # Its own session: Ctrl-C in the terminal must reach the owner only.
        self._janitor = subprocess.Popen(
            ["/bin/sh", "-c", JANITOR, "janitor", str(self._folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        self._port, self._dist_port, self._epmd_port = free_ports(3)
        self._node = f"mqinfer-{secrets.token_hex(4)}@localhost"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        """Where it listens, with the name and password that every new RabbitMQ has."""
        return f"amqp://guest:guest@127.0.0.1:{self._port}/"

    @property
    def pid(self) -> int:
        """The server's first process; while it runs. Raises: KeyError."""
        return self._processes["server"].pid

    def start(self) -> None:
        """Returns when it answers. Raises: BrokerFailed, and nothing of it runs then."""
        server = find_server()
        if server is None:
            raise BrokerFailed("rabbitmq-server and epmd are not installed")
        self._write_config()
        try:
            self._run("epmd", ["epmd", "-address", "127.0.0.1", "-port", str(self._epmd_port)])
            self._wait_for("epmd", self._epmd_port, b"")
            self._run("server", [server])
            self._wait_for("server", self._port, b"AMQP\x00\x00\x09\x01")
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End it as an operator does: it writes down all that is durable first. Harmless where it does not run."""
        if server := self._processes.get("server"):
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End it as a power cut would. Confirmed messages outlive it; a queue declared just before may not."""
        for name, process in reversed(self._processes.items()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            (self._folder / f"{name}.pid").unlink()
        self._processes.clear()

    def restart(self) -> None:
        """Stop it and start it on the same data and port."""
        self.stop()
        self.start()

    def ctl(self, *arguments: str) -> str:
        """What `rabbitmqctl` says about the running node. Raises: CalledProcessError, TimeoutExpired."""
        debian = DEBIAN_SERVER.with_name("rabbitmqctl")
        command = [str(debian) if debian.exists() else "rabbitmqctl", *arguments]
        return subprocess.run(
            command, env=self._environment(), capture_output=True, text=True, check=True, timeout=CTL_TIMEOUT_S
        ).stdout

    def close(self) -> None:
        """End it and remove all that it wrote; twice is harmless."""
        self.kill()
        if self._janitor.stdin is not None:
            self._janitor.stdin.close()
        self._janitor.wait()

    def _write_config(self) -> None:
        config = (
            f"listeners.tcp.1 = 127.0.0.1:{self._port}\n"
            "loopback_users = none\n"
            "disk_free_limit.absolute = 50MB\n"  # the default refuses messages on a small disk
        )
        (self._folder / "rabbitmq.conf").write_text(config + self._config)
        (self._folder / "advanced.config").write_text(self._advanced)
        (self._folder / "enabled_plugins").write_text("[].\n")
        (self._folder / "env.conf").touch()

    def _environment(self) -> Mapping[str, str]:
        folder = str(self._folder)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RABBITMQ_", "ERL_"))}
        return kept | {
            "HOME": folder,  # where Erlang keeps its cookie
            "ERL_CRASH_DUMP": f"{folder}/erl_crash.dump",  # not in the folder of whoever started it
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/env.conf",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{folder}/advanced.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_MNESIA_BASE": f"{folder}/mnesia",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_PID_FILE": f"{folder}/erlang-pid",
            # Nobody outside may join; idle schedulers must not spin on a small machine.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}"
            " +sbwt none +sbwtdcpu none +sbwtdio none",
        }

    def _run(self, name: str, command: Sequence[str]) -> None:
        with (self._folder / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                command,
                env=self._environment(),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes[name] = process
        (self._folder / f"{name}.pid").write_text(str(process.pid))

    def _wait_for(self, name: str, port: int, greeting: bytes) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(port, greeting):
            ended = self._processes[name].poll() is not None
            if ended or time.monotonic() > deadline:
                said = (self._folder / f"{name}.out").read_text(errors="replace")[-2000:]
                raise BrokerFailed(f"{name} {'ended' if ended else 'did not answer in time'}:\n{said}")
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on just now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in sockets]


def answers(port: int, greeting: bytes) -> bool:
    """Whether somebody on that loopback port takes a connection and, where one greets, says something back."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(greeting)
            return not greeting or client.recv(1) == b"\x01"  # an AMQP method frame: Connection.Start
    except OSError:
        return False


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run a node until Ctrl-C or SIGTERM; its URL is the first line of the output."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job begins with SIGINT ignored
        signal.signal(number, _interrupt)
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(PrivateBroker()) as broker:
        try:
            broker.start()
        except BrokerFailed as error:
            print(error, file=sys.stderr)
            return 1
        print(broker.url, flush=True)
        print("Ctrl-C ends it and removes its data.", file=sys.stderr, flush=True)
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
