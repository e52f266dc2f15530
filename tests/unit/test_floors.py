"""The floors of the house: who may import whom, and where each third-party package is at home.

Every import counts: at the top, in a function, under a condition, for type checking only, by `import_module`. A new
module or package is entered in the tables below, and that is the moment to think about where it belongs.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import mqinfer

PACKAGE = Path(mqinfer.__file__).parent


@dataclass(frozen=True, slots=True)
class Room:
    """Modules that may import each other (never in a circle) and everything on lower floors."""

    name: str
    floor: int
    modules: str


#: Rooms of one floor are blind to each other.
ROOMS = (
    Room("words", 0, "__init__ errors observe"),
    Room(
        "what travels",
        1,
        "messages wire wire_fields wire_header queues permissions toml_table plan host_profile settings hours families",
    ),
    Room("codec", 2, "tensor_codec"),
    Room(
        "transports",
        2,
        "transports transports.base transports.memory transports.memory_broker "
        "transports.rabbitmq transports.rabbitmq_alarm transports.rabbitmq_connect transports.rabbitmq_link",
    ),
    Room("checkpoint", 2, "checkpoint headers anatomy hub"),
    Room("compute", 2, "stage_model stage_weights pruning packed_linear attention padding kv_cache sampler device"),
    Room("gpu guests", 2, "gpu_guests"),
    Room("text", 2, "tokenizer"),
    Room(
        "policy",
        2,
        "batching codec_choice pacing verdicts partition placement rows scheduler forecast scaling fleet_costs "
        "fleet_search fleet_order fleet_moves fleet_cut fleet_plan fleet_growth gpus",
    ),
    Room("engine", 3, "stage_engine"),
    Room("link", 3, "link reports"),
    Room("survey", 3, "survey"),
    Room("worker", 4, "stage_worker stage_inbox stage_outbox stage_compute stage_counts presence paused profiling"),
    Room("coordinator", 4, "coordinator coordinator_counts leases requests"),
    Room("producer", 4, "producer"),
    Room("autoscaler", 4, "autoscaler actuators"),
    Room("dead letters", 4, "dead_letters"),
    Room("link profile", 4, "link_profile"),
    Room(
        "doors",
        5,
        "__main__ cli cli_plan cli_queues cli_scaling cli_workers launch flags running systemd metrics tracing "
        "commands worker_command joining pause_command operate top console advice_words pipeline_view embedded "
        "compact_sets batch_files batch_output batch_rows batch_job openai_bodies fleet_file fleet_commands",
    ),
)

#: Third-party package -> the only modules that may import it. Policy has none: the standard library must do.
HOMES = {
    "aio_pika": "transports.rabbitmq transports.rabbitmq_connect transports.rabbitmq_link",
    "aiormq": "transports.rabbitmq transports.rabbitmq_alarm transports.rabbitmq_connect transports.rabbitmq_link",
    "huggingface_hub": "hub",
    "jinja2": "tokenizer",
    "msgpack": "wire_header",
    "numpy": "tensor_codec",
    "opentelemetry": "tracing",
    "prometheus_client": "metrics",
    "pynvml": "gpu_guests",
    "pydantic": "settings openai_bodies",
    "pydantic_settings": "settings",
    "rich": "console pipeline_view top",
    "safetensors": "stage_weights",
    "structlog": "observe",
    "tenacity": "link",
    "torch": "tensor_codec stage_model stage_weights pruning packed_linear attention padding kv_cache sampler device "
    "stage_engine stage_compute profiling",
    "transformers": "checkpoint stage_model stage_weights pruning attention padding tokenizer",
    "typer": "cli cli_plan cli_queues cli_scaling cli_workers launch flags",
    "uvloop": "running",
    "xxhash": "wire",
    "yarl": "transports.rabbitmq_connect",
    "zstandard": "tensor_codec",
}

#: Looks between rooms of one floor that are allowed, each with its reason.
WINDOWS = {
    ("checkpoint", "partition"),  # what the layers of a checkpoint cost is told in the planner's own words
}

ROOM_OF = {module: room for room in ROOMS for module in room.modules.split()}


@dataclass(frozen=True, slots=True, order=True)
class Import:
    """One import statement, or one name of it."""

    module: str
    line: int
    #: Absolute dotted name, "." where the import is relative, "?" where the name is computed.
    name: str

    @property
    def package(self) -> str:
        """The top-level package."""
        return self.name.partition(".")[0]


def sources(root: Path) -> dict[str, Path]:
    """Module name without the leading `mqinfer.` -> its file; a package goes by its folder's name."""
    names = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return names


def imported_names(node: ast.AST) -> list[str]:
    """What this one node imports."""
    match node:
        case ast.Import(names=aliases):
            return [alias.name for alias in aliases]
        case ast.ImportFrom(level=0, module=str(origin), names=aliases):
            return [f"{origin}.{alias.name}" for alias in aliases]
        case ast.ImportFrom():
            return ["."]
        case ast.Call(func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module")):
            first = node.args[0] if node.args else None
            return [first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else "?"]
    return []


def imports(root: Path) -> list[Import]:
    """Every import of the package."""
    return sorted(
        Import(module, getattr(node, "lineno", 0), name)
        for module, path in sources(root).items()
        for node in ast.walk(ast.parse(path.read_text(), filename=str(path)))
        for name in imported_names(node)
    )


def target(name: str, modules: Iterable[str]) -> str:
    """The module of ours that `mqinfer.something.Name` comes from."""
    parts = name.split(".")[1:]
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in modules), "__init__")


def faults(root: Path) -> list[str]:
    """What breaks the rules, a sentence for each."""
    modules = sources(root)
    strangers = [f"{module} is not in the table" for module in sorted(modules.keys() - ROOM_OF.keys())]
    known = (found for found in imports(root) if found.module in ROOM_OF)
    return strangers + [f"{found.module}:{found.line} {why}" for found in known if (why := fault(found, modules))]


def fault(found: Import, modules: Iterable[str]) -> str | None:
    """What is wrong with an import, or None."""
    if found.name == ".":
        return "imports by a relative name"
    if found.name == "?":
        return "imports by a computed name"
    if found.package == "mqinfer":
        return inner_fault(found.module, target(found.name, modules))
    if found.package in sys.stdlib_module_names or found.module in HOMES.get(found.package, "").split():
        return None
    return f"imports {found.package}, which is not at home there"


def inner_fault(module: str, other: str) -> str | None:
    """What is wrong with `module` importing `other`, or None."""
    here, there = ROOM_OF[module], ROOM_OF.get(other)
    if there is None:
        return f"imports {other}, which is not in the table"
    if there.name == here.name or there.floor < here.floor or (module, other) in WINDOWS:
        return None
    if there.floor == here.floor:
        return f"({here.name}) looks into {other} ({there.name}) on its own floor"
    return f"(floor {here.floor}) imports {other} of floor {there.floor}"


def circle(root: Path) -> list[str]:
    """Modules that import each other in a circle; empty where there is none."""
    modules = sources(root)
    graph: Mapping[str, set[str]] = {module: set() for module in modules}
    for found in imports(root):
        if found.package == "mqinfer" and (other := target(found.name, modules)) != found.module:
            graph[found.module].add(other)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_import_goes_down_and_every_package_stays_at_home() -> None:
    assert faults(PACKAGE) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(PACKAGE) == []


def test_the_tables_name_nothing_that_is_not_there() -> None:
    modules = sources(PACKAGE)
    used = {(found.package, found.module) for found in imports(PACKAGE)}
    homes = {(package, module) for package, line in HOMES.items() for module in line.split()}
    assert sorted(ROOM_OF.keys() - modules.keys()) == []
    assert sorted(homes - used) == []


#: As on a machine where only `pip install mqinfer` was run, without the extra `worker`.
WITHOUT_WORKER = """
import importlib.machinery, sys
absent, path = {"torch", "zstandard"}, importlib.machinery.PathFinder
find = path.find_spec
path.find_spec = lambda name, *rest: None if name.split(".")[0] in absent else find(name, *rest)
"""


def run_without_worker(statement: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT_WORKER + statement
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)


def test_producer_coordinator_and_command_line_can_be_imported_without_torch() -> None:
    done = run_without_worker("import mqinfer.producer, mqinfer.coordinator, mqinfer.cli")
    assert done.returncode == 0, done.stderr


def test_torch_really_is_absent_in_that_test() -> None:
    assert "No module named 'torch'" in run_without_worker("import torch").stderr


# The checker itself: it must see what it is there for.


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package with all the modules of the table, all empty."""
    packages = {module.rpartition(".")[0] for module in ROOM_OF} - {""}
    for module in ROOM_OF:
        path = tmp_path / module.replace(".", "/")
        path = path / "__init__.py" if module in packages else path.with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def test_an_empty_house_has_no_faults(tree: Path) -> None:
    assert (faults(tree), circle(tree)) == ([], [])


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("queues", "from mqinfer.coordinator import Coordinator", "queues:1 (floor 1) imports coordinator of floor 4"),
        ("queues", "import mqinfer.coordinator as c", "queues:1 (floor 1) imports coordinator of floor 4"),
        ("queues", "from mqinfer import plan, cli", "queues:1 (floor 1) imports cli of floor 5"),
        ("observe", "def late():\n    from mqinfer.plan import Plan", "observe:2 (floor 0) imports plan of floor 1"),
        ("plan", "if TYPE_CHECKING:\n    import mqinfer.link", "plan:2 (floor 1) imports link of floor 3"),
        ("plan", "try:\n    import torch\nexcept ImportError: ...", "plan:2 imports torch, which is not at home there"),
        ("kv_cache", "import mqinfer.wire, aio_pika", "kv_cache:1 imports aio_pika, which is not at home there"),
        ("batching", "import numpy.linalg", "batching:1 imports numpy, which is not at home there"),
        ("sampler", "import mqinfer.transports.base", "sampler:1 (compute) looks into transports.base (transports)"),
        ("stage_worker", "from mqinfer import leases", "stage_worker:1 (worker) looks into leases (coordinator)"),
        ("producer", "importlib.import_module('torch')", "producer:1 imports torch, which is not at home there"),
        ("producer", "__import__('tor' + 'ch')", "producer:1 imports by a computed name"),
        ("producer", "from . import link", "producer:1 imports by a relative name"),
        ("brand_new", "", "brand_new is not in the table"),
        ("cli", "import mqinfer.brand_new", "cli:1 imports brand_new, which is not in the table"),
    ],
)
def test_the_checker_sees(tree: Path, module: str, source: str, expected: str) -> None:
    (tree / "brand_new.py").touch()
    (tree / f"{module}.py").write_text(source)
    assert any(sentence.startswith(expected) for sentence in faults(tree))


def test_the_checker_lets_pass_what_is_allowed(tree: Path) -> None:
    (tree / "checkpoint.py").write_text("from mqinfer.partition import cut\nimport transformers, json")
    (tree / "cli.py").write_text("def late():\n    import mqinfer.stage_worker, mqinfer.commands, typer, os.path")
    (tree / "transports" / "rabbitmq.py").write_text("from mqinfer.transports.base import Transport\nimport aio_pika")
    assert faults(tree) == []


def test_the_checker_sees_a_circle_of_late_imports(tree: Path) -> None:
    (tree / "plan.py").write_text("import mqinfer.queues")
    (tree / "queues.py").write_text("def late():\n    from mqinfer.plan import Plan")
    assert {"plan", "queues"} <= set(circle(tree))
