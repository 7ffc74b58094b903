"""The shape of the library itself: who may import whom, how long things are, that table and files agree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from riverrun.mixers import MIXERS

ROOT = Path(__file__).parents[1] / "riverrun"
FILES = sorted(ROOT.rglob("*.py"))
# each may import what stands before it, and its own folder
LINE = (
    "state recurrences algorithms kernels signature ops nn mixers models training distributed inference "
    "conversion tasks claims commands cli __main__"
).split()
# beside the line: the last place whose things each of them may import
BESIDE = {"config": None, "disk": None, "data": "config", "testing": "mixers", "doctor": "mixers"}


def place(module: str) -> str:
    return module.split(".")[1]


def allowed(here: str, there: str) -> bool:
    if here == there:
        return True
    if here in BESIDE:
        last = BESIDE[here]
        if last in LINE:
            return there in LINE[: LINE.index(last) + 1] or (
                here == "doctor" and there in ("testing", "config")
            )
        return there == last
    if there in BESIDE:  # tests are for users, data for models on, settings for layers on, files for all
        reach = dict(testing="cli", doctor="training", data="models", config="nn", disk="state")[there]
        return LINE.index(here) >= LINE.index(reach)
    return LINE.index(there) < LINE.index(here)


def own_imports(path: Path):
    """(module imported, whether inside a function) for every import of ours, relative ones resolved."""
    package = ("riverrun", *path.relative_to(ROOT).parts[:-1])
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1]] if node.level else [])
            base = ".".join(filter(None, [base, node.module]))
            names = [f"{base}.{a.name}" for a in node.names]
        for name in names:
            if name.startswith("riverrun.") and name != "riverrun.__version__":
                yield name, id(node) in inside


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_left_and_stand_at_the_top(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    for module, inside in own_imports(path):
        assert not inside, f"{path} imports {module} inside a function"
        if parts[0] == "__init__":
            pytest.fail(f"riverrun/__init__.py imports {module}")
        assert allowed(parts[0], place(module)), f"{parts[0]} imports {module}, which is not to its left"
        if parts[0] == "mixers" and parts[-1] != "__init__":
            assert place(module) != "mixers", (
                f"mixer {parts[-1]} imports {module}: a mixer never imports a mixer"
            )


def test_no_cycles():
    graph = {}
    modules = {
        ".".join(("riverrun", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for p in FILES
    }
    for path in FILES:
        name = ".".join(("riverrun", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        targets = {m if m in modules else m.rpartition(".")[0] for m, _ in own_imports(path)}
        graph[name] = {t for t in targets if t in modules and t != name}
    done: set[str] = set()

    def visit(node, trail):
        assert node not in trail, f"import cycle: {' -> '.join([*trail[trail.index(node) :], node])}"
        if node not in done:
            for target in graph[node]:
                visit(target, [*trail, node])
            done.add(node)

    for node in graph:
        visit(node, [])


def limits(path: Path) -> tuple[int, int]:
    """(lines of a file, lines of a function)."""
    parts = path.relative_to(ROOT).parts
    if parts == ("mixers", "table.py"):  # it grows by a row a mixer, and is read a row at a time
        return 1000, 0
    if parts[0] == "kernels":
        return 400, 120
    if parts[0] == "mixers" and path.stem != "__init__":
        return 120, 60
    return {"recurrences": (100, 40), "algorithms": (200, 40)}.get(parts[0], (300, 40))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    text = path.read_text()
    file_limit, function_limit = limits(path)
    assert len(text.splitlines()) <= file_limit, f"{len(text.splitlines())} lines; at most {file_limit}"
    tree = ast.parse(text)
    assert not text.strip() or ast.get_docstring(tree), "a module says what it is"
    for f in ast.walk(tree):
        if not isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        length = f.end_lineno - f.lineno + 1
        assert length <= function_limit, f"{f.name} has {length} lines; at most {function_limit}"
        if not path.is_relative_to(ROOT / "kernels"):
            count = (
                len(f.args.args)
                + len(f.args.kwonlyargs)
                - (bool(f.args.args) and f.args.args[0].arg == "self")
            )
            # a mixer's and a command's arguments are their settings: one a line, each with its default
            if f.name != "__init__" and not path.is_relative_to(ROOT / "commands"):
                assert count <= 8, f"{f.name} takes {count} arguments; at most 8"


def test_every_mixer_file_has_a_row_and_every_row_a_file():
    files = {p.stem for p in (ROOT / "mixers").glob("*.py")} - {"__init__", "table"}
    assert files == set(MIXERS), (
        f"without a row: {files - set(MIXERS)}; without a file: {set(MIXERS) - files}"
    )


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_cites_its_paper_and_takes_no_loose_arguments(name):
    text = (ROOT / "mixers" / f"{name}.py").read_text()
    if MIXERS[name].arxiv:
        assert f"arXiv:{MIXERS[name].arxiv}" in text, "the docstring cites the row's paper"
    assert "**kwargs" not in text, "an argument nobody reads is a mistake nobody sees"
    assert MIXERS[name].golden, "a row names its golden numbers, or says why there are none"
    assert MIXERS[name].good and MIXERS[name].bad, "a row says what its mixer is good and bad at"


IMPORT = """
import sys, time
start = time.perf_counter()
import riverrun
bare = time.perf_counter() - start
assert "torch" not in sys.modules, "import riverrun brings torch"
import numba.core.dispatcher as d
compiled = []
original = d.Dispatcher.compile
d.Dispatcher.compile = lambda self, sig: compiled.append(self) or original(self, sig)
import riverrun.ops, riverrun.mixers, riverrun.models.language
assert not compiled, f"importing compiled {compiled}"
print(bare, time.perf_counter() - start)
"""


def test_importing_compiles_nothing_and_is_quick():
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    bare, everything = map(float, run.stdout.split())
    # the promise is 3 s for `import riverrun`, which imports nothing; the rest is PyTorch's own import
    assert bare < 3, f"import riverrun took {bare:.1f} s"


def test_no_folder_is_a_drawer():
    names = {p.name for p in ROOT.rglob("*") if p.is_dir()} | {p.stem for p in FILES}
    assert not names & {"utils", "common", "core", "modules", "helpers", "misc"}
