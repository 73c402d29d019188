"""What a machine can keep of the house's rules (CONTRIBUTING.md). Each rule is tried on small sources that break it."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class File:
    """A text file. path is from the repository's root."""

    path: str
    text: str

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text)))

    def within(self, *folders: str) -> bool:
        """Whether it is Python in one of these folders."""
        return self.path.endswith(".py") and self.path.startswith(tuple(f"{folder}/" for folder in folders))


Breaches = Iterator[tuple[int, str]]  # line, what is wrong there

PACKAGE, KERNELS, OPS, TUNING = "src/trinorm", "src/trinorm/kernels", "src/trinorm/ops", "src/trinorm/tuning"

# The parts of the package. A part imports only itself and the parts above it.
FLOW = (
    "switches",
    "spec",
    "formats",
    "compare",
    "kernels",
    "reference",
    "launch",
    "replay",
    "tuning",
    "ops",
    "checks",
    "functional",
    "shown",
    "held",
    "channel_calls",
    "nn",
    "models",
    "__init__",
    "integrations",
    "interpreter",
    "targets",
    "inspection",
    "forced",
    "norms",
    "cases",
    "bench",
    "cli",
    "__main__",
)


def imported(file: File) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, with its line; by absolute name, whatever way it is written."""
    parents = file.path.removeprefix("src/").removesuffix(".py").split("/")[:-1]
    for node in file.nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            # `from . import spec` names modules where others name what is in them.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "trinorm" else [module]
            yield from ((node.lineno, name) for name in names)


def called(node: ast.AST) -> str:
    """The last name of what a call calls; "" for anything but a call."""
    function = node.func if isinstance(node, ast.Call) else None
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""


def kernels_import_only_triton(file: File) -> Breaches:
    for line, module in imported(file) if file.within(KERNELS) else ():
        if not f"{module}.".startswith(("triton.", "trinorm.kernels.", "__future__.")):
            yield line, f"kernels/ imports {module}"


def programs_are_told_apart_in_index(file: File) -> Breaches:
    for node in file.nodes if file.within("src") and file.path != f"{KERNELS}/index.py" else ():
        if isinstance(node, ast.Attribute) and node.attr in ("program_id", "num_programs"):
            yield node.lineno, f"tl.{node.attr} outside kernels/index.py"


def launch_widths_are_chosen_in_tuning(file: File) -> Breaches:
    for node in file.nodes if file.within("src") and not file.within(TUNING) else ():
        pairs: Iterable[tuple[object, ast.expr]] = ()
        if isinstance(node, ast.Call):
            pairs = ((keyword.arg, keyword.value) for keyword in node.keywords)
        elif isinstance(node, ast.Dict):
            pairs = ((getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True))
        for name, value in pairs:
            if name in ("num_warps", "num_stages") and isinstance(value, ast.Constant):
                yield value.lineno, f"{name}={value.value} outside tuning/"


def comparisons_are_used(file: File) -> Breaches:
    for node in file.nodes if file.within("src", "tests") else ():
        if isinstance(node, ast.Expr) and called(node.value) in ("allclose", "isclose", "equal", "array_equal", "compare"):
            yield node.lineno, f"the result of {called(node.value)} is dropped"


def files_are_short(file: File) -> Breaches:
    lines = file.text.count("\n")
    if file.within("src", "tests") and lines > 400:
        yield lines, f"{lines} lines, over 400"


def imports_flow_one_way(file: File) -> Breaches:
    if not file.within(PACKAGE):
        return
    part = file.path.removeprefix(f"{PACKAGE}/").removesuffix(".py").split("/")[0]
    if part not in FLOW:
        yield 1, f"{part} has no place in FLOW"
        return
    for line, module in imported(file):
        package, _, rest = module.partition(".")
        name = rest.partition(".")[0]
        # What is not a part is a name in the package's __init__.
        if package == "trinorm" and FLOW.index(name if name in FLOW else "__init__") > FLOW.index(part):
            yield line, f"{part} imports {module}"


# Hosts that a reader is sent to. Where packages come from is the business of the machine that installs them.
HOSTS = ("arxiv.org", "www.apache.org", "keepachangelog.com", "semver.org")


def files_name_no_host_and_no_machine(file: File) -> Breaches:
    for number, line in enumerate(file.text.splitlines(), 1):
        for host in re.findall(r"\w+://([\w.-]+)", line):
            if host not in HOSTS:
                yield number, f"names the host {host}"
        if re.search(r"\b(index|find)[-_](url|links)\b", line):
            yield number, "says where packages come from"
        if re.search(r"(?<![\w.})])/(home|root|Users|work|workspace|opt|tmp|mnt|srv)/", line):
            yield number, "names a path of some machine"


def merges_are_finished(file: File) -> Breaches:
    for number, line in enumerate(file.text.splitlines(), 1):
        if re.match(r"(<{7}|>{7}|\|{7}) ", line):
            yield number, "a merge left both sides here"


Rule = Callable[[File], Breaches]

RULES: dict[Rule, tuple[list[File], list[File]]] = {
    # rule: (files that break it, files that keep it)
    kernels_import_only_triton: (
        [
            File(f"{KERNELS}/a.py", "import torch"),
            File(f"{KERNELS}/a.py", "from ..spec import RowNorm"),
            File(f"{KERNELS}/a.py", "def f():\n    from .. import spec"),
            File(f"{KERNELS}/a.py", "import tritonic"),
        ],
        [
            File(f"{KERNELS}/a.py", "import triton.language as tl\nfrom . import stats\nfrom .index import load"),
            File(f"{OPS}/a.py", "import torch"),
        ],
    ),
    programs_are_told_apart_in_index: (
        [File(f"{KERNELS}/row.py", "i = tl.program_id(0)"), File(f"{OPS}/a.py", "triton.language.num_programs(0)")],
        [File(f"{KERNELS}/index.py", "i = tl.program_id(0)"), File(f"{KERNELS}/row.py", "i = first_program()")],
    ),
    launch_widths_are_chosen_in_tuning: (
        [
            File(f"{OPS}/rows.py", "launch(kernel, options | dict(N=n, num_warps=4))"),
            File(f"{OPS}/rows.py", "options = {'num_stages': 3}"),
        ],
        [
            File(f"{OPS}/rows.py", "launch(kernel, dict(num_warps=plan.warps))\noptions = {'num_warps': warps, **more}"),
            File(f"{TUNING}/row.py", "options = dict(num_warps=4)"),
        ],
    ),
    comparisons_are_used: (
        [
            File("tests/test_a.py", "torch.allclose(a, b)"),
            File("tests/test_a.py", "def f():\n    compare('y', a, b, c)"),
            File(f"{PACKAGE}/a.py", "a.equal(b)"),
        ],
        [File("tests/test_a.py", "assert torch.equal(a, b)\nok = compare('y', a, b, c).ok\nassert_no_worse('y', a, b, c)")],
    ),
    files_are_short: (
        [File("tests/test_a.py", "\n" * 401)],
        [File("tests/test_a.py", "\n" * 400), File("docs/a.md", "\n" * 401)],
    ),
    imports_flow_one_way: (
        [
            File(f"{TUNING}/row.py", "from ..ops import rows"),
            File(f"{TUNING}/row.py", "def f():\n    from .. import functional"),
            File(f"{PACKAGE}/functional.py", "import trinorm.nn"),
            File(f"{PACKAGE}/functional.py", "from . import spec, nn"),
            File(f"{OPS}/row.py", "import trinorm"),
            File(f"{OPS}/row.py", "from .. import __version__"),
            File(f"{PACKAGE}/unheard_of.py", ""),
        ],
        [
            File(f"{OPS}/row.py", "from . import rows\nfrom ..kernels.row import row_forward\nfrom .. import reference"),
            File(f"{PACKAGE}/__init__.py", "from . import functional, nn"),
            File(f"{PACKAGE}/cli/__init__.py", "from .. import __version__"),
            File("tests/test_a.py", "import trinorm"),
        ],
    ),
    files_name_no_host_and_no_machine: (
        [
            File("README.md", "see https" + "://example.org/simple"),
            File("constraints.txt", "--extra-index" + "-url x"),
            File("docs/a.md", "in /ho" + "me/me/trinorm"),
            File(f"{PACKAGE}/a.py", "open('/tm" + "p/x')"),
        ],
        [
            File("README.md", "https://arxiv.org/abs/1607.06450; benchmarks/results/ and tests/tmp/x"),
            File("Makefile", "rm -rf $(BUILD)/tmp/"),
        ],
    ),
    merges_are_finished: (
        [File("a.md", "one\n" + "<" * 7 + " HEAD\ntwo"), File("a.py", ">" * 7 + " other\n")],
        [File("a.md", "Title\n=======\n\n>>> f()")],
    ),
}


@pytest.fixture(scope="module")
def house() -> list[File]:
    """Every text file that the repository keeps."""
    folders = ("src", "tests", "docs", "examples", "benchmarks", "hub", ".ci")
    paths = [path for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")]
    paths += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    text = {"", ".py", ".md", ".toml", ".txt", ".json", ".jsonl"}
    return [File(path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) for path in paths if path.suffix in text]


def rule_and_file(broken: bool) -> pytest.MarkDecorator:
    cases = [
        pytest.param(rule, file, id=f"{rule.__name__}-{number}")
        for rule, (bad, good) in RULES.items()
        for number, file in enumerate(bad if broken else good)
    ]
    return pytest.mark.parametrize(("rule", "file"), cases)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Rule, house: list[File]) -> None:
    assert [f"{file.path}:{line}: {what}" for file in house for line, what in rule(file)] == []


@rule_and_file(broken=True)
def test_rule_finds_what_breaks_it(rule: Rule, file: File) -> None:
    assert list(rule(file))


@rule_and_file(broken=False)
def test_rule_passes_what_keeps_it(rule: Rule, file: File) -> None:
    assert list(rule(file)) == []


def test_the_walk_sees_the_house(house: list[File]) -> None:
    paths = {file.path for file in house}
    assert {"Makefile", ".ci/run", "docs/mathematics.md", "tests/test_house.py", f"{KERNELS}/index.py"} <= paths


def test_every_folder_of_the_house_is_in_the_sdist(house: list[File]) -> None:
    """Else its tests would fail where it is unpacked."""
    text = next(file.text for file in house if file.path == "pyproject.toml")
    (included,) = re.findall(r"targets\.sdist\]\ninclude = (\[.*\])", text)
    folders = {f"/{file.path.split('/')[0]}" for file in house if "/" in file.path}
    assert folders - set(ast.literal_eval(included)) == set()


# A helper that no kernel calls rots: nothing would notice if it were wrong.


def unreached(files: list[File]) -> set[str]:
    """The functions of kernels/ that no kernel needs which ops/ names."""
    uses: dict[str, set[str]] = {}
    for file in files:
        for node in file.nodes if file.within(KERNELS) else ():
            if isinstance(node, ast.FunctionDef):
                assert node.name not in uses, f"two functions of kernels/ are called {node.name}"
                uses[node.name] = {name.id for part in node.body for name in ast.walk(part) if isinstance(name, ast.Name)}
    waiting = {node.id for file in files if file.within(OPS) for node in file.nodes if isinstance(node, ast.Name)}
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting |= uses.get(name, set()) - reached
    return set(uses) - reached


def test_every_kernel_function_is_reached(house: list[File]) -> None:
    assert unreached(house) == set()


def test_unreached_functions_are_found() -> None:
    kernels = """
@triton.jit
def helper(x): return deeper(x)
@triton.jit
def deeper(x): return x
@triton.jit
def kernel(X): helper(X)
@triton.jit
def forgotten(X): helper(X)
@triton.constexpr_function
def only_forgotten_ones_call_it(n): return forgotten
"""
    ops = "launch(kernel, grid, device, args, options)"
    files = [File(f"{KERNELS}/a.py", kernels), File(f"{OPS}/a.py", ops)]
    assert unreached(files) == {"forgotten", "only_forgotten_ones_call_it"}
    assert unreached(files[:1]) == {"helper", "deeper", "kernel", "forgotten", "only_forgotten_ones_call_it"}
