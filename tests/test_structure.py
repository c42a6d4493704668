"""The package is a house: its rooms lie on floors, imports lead down, and no file is long."""

import ast
from pathlib import Path

import networkx  # a dependency of torch

PACKAGE = Path(__file__).parents[1] / "lit_specrl"
FLOORS = [  # from bottom to top; a room imports itself and rooms of lower floors
    {"types", "seeds", "timing", "masking", "answers", "precision", "allocator"},
    {"checkpoints"},
    {"distributed"},
    {"losses", "advantages", "experience"},
    {"metrics"},
    {"data", "rewards"},
    {"environments"},
    {"models"},
    {"drafting"},
    {"prefix_cache"},
    {"engines"},
    {"algorithms"},
    {"callbacks"},
    {"cli"},
    {"bench"},
    {"cli.main"},  # the command line starts everything
    {"cli.__main__"},
]
MAX_LOOSE_MODULES, MAX_LINES = 10, 400
LONGER = {
    "algorithms.rlvr": 615,  # 210 of them are the constructor, which documents 45 arguments
    "types": 430,  # carriers, whose fields are described one by one
}


def name_of(path):
    """`models/policy.py` -> `models.policy`, `models/__init__.py` -> `models`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem[0] != "_"}


def imported_names(path):
    """All that a file imports, also in functions and for type checkers: a module, or a module and a name in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(path):
    """Names of the package's own modules that a file imports. A parent package counts where it is named itself."""
    for name in imported_names(path):
        package, _, module = name.partition(".")
        if package == "lit_specrl":
            if module not in FILES:
                module = module.rpartition(".")[0]
            if module:  # not the package's own `__init__`, which gives every public name
                yield module


GRAPH = {name: set(imports(path)) for name, path in FILES.items()}


def room(module):
    """`cli.main` -> `cli.main`, which has a floor of its own; `models.policy` -> `models`."""
    return module if any(module in rooms for rooms in FLOORS) else module.partition(".")[0]


def floor(module):
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def upward_imports(graph):
    """`a -> b` where b lies above a, or in another room of the same floor."""
    return [
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if room(other) != room(module) and floor(other) >= floor(module)
    ]


def test_every_room_has_a_floor():
    assert {room(module) for module in GRAPH} == set().union(*FLOORS)


def circles(graph):
    """Groups of modules that import each other, directly or by a detour."""
    groups = networkx.strongly_connected_components(networkx.DiGraph(graph))
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_no_module_imports_itself_by_a_detour():
    assert circles(GRAPH) == []


def test_imports_lead_down():
    upward = upward_imports(GRAPH)
    assert not upward, "\n".join(["upward:", *upward])


def test_few_modules_lie_loose():
    loose = sorted(module for module in GRAPH if FILES[module].parent == PACKAGE)
    for number, rooms in reversed(list(enumerate(FLOORS))):
        print(f"{number:2d}  {' '.join(sorted(rooms))}")
    print(f"{len(loose)} loose modules: {' '.join(loose)}")
    assert len(loose) <= MAX_LOOSE_MODULES


def test_no_file_is_long():
    lengths = sorted((len(path.read_text().splitlines()), name) for name, path in FILES.items())
    length, name = lengths[-1]
    print(f"longest file: {name}, {length} lines")
    too_long = [f"{name}: {length}" for length, name in lengths if length > LONGER.get(name, MAX_LINES)]
    assert not too_long, too_long


def test_only_its_adapter_imports_vllm():
    users = {name for name, path in FILES.items() for used in imported_names(path) if used.split(".")[0] == "vllm"}
    assert {user.rpartition(".")[0] for user in users} == {"engines.vllm"}


# ------------------------------------------------------------------------------------------ the tests see what is wrong


def test_an_import_that_leads_up_is_seen():
    graph = {"types": {"models.policy"}, "data.loader": {"rewards.base"}, "cli.fit": {"cli.main", "data"}}
    assert upward_imports(graph) == ["types -> models.policy", "data.loader -> rewards.base", "cli.fit -> cli.main"]
    assert upward_imports({"models.policy": {"types", "models.lora"}, "cli.main": {"bench.command", "cli.fit"}}) == []


def test_circles_are_seen():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circles(graph) == [["a", "b", "c"]]
    assert circles(graph | {"c": set()}) == []


def test_imports_in_functions_and_for_type_checkers_are_seen(tmp_path):
    file = tmp_path / "one.py"
    file.write_text(
        "import torch\n"
        "if TYPE_CHECKING:\n    from lit_specrl.models.policy import Policy\n"
        "def late():\n    from lit_specrl.cli import main\n    import lit_specrl.rewards\n    from lit_specrl import GRPO\n"
    )
    assert list(imports(file)) == ["models.policy", "cli.main", "rewards"]
