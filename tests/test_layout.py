"""The house: which room may import which, where imports stand, and what an installed package holds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hsivi_fast"

# Lowest first. A room imports from floors below its own alone: rooms that share a floor do not know each other.
FLOORS = [
    {"kernels"},
    {"ops"},
    {"method", "nets"},
    {"config", "data", "execution"},
    {"density", "parallel"},
    {"checkpoints"},
    {"build"},
    {"sampling"},
    {"metrics"},
    {"report", "export"},
    {"training", "diffusers"},
    {"cli"},
]


def _floor(room):
    return next(index for index, rooms in enumerate(FLOORS) if room in rooms)


def _room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(path):
    """Rooms of ours that a file imports, wherever in the file the import stands."""
    package = ("hsivi_fast", *path.relative_to(PACKAGE).parent.parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            names = [(*module, alias.name) for alias in node.names] if len(module) == 1 else [module]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        rooms |= {name[1] for name in names if len(name) > 1 and name[0] == "hsivi_fast"}
    return rooms


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_the_floors_below_it_alone(path):
    room = _room(path)
    for other in _imports(path) - {room}:
        assert _floor(other) < _floor(room), f"{room} imports {other}"


def test_every_room_has_a_floor_and_no_floor_holds_half_of_the_house():
    rooms = [room for floor in FLOORS for room in floor]
    assert len(rooms) == len(set(rooms)) and {_room(path) for path in FILES} == set(rooms) - {"kernels"}
    assert max(len(floor) for floor in FLOORS) <= 3


def test_config_execution_and_data_import_nothing_of_ours_and_only_ops_imports_kernels():
    for name in ("config", "execution", "data"):
        assert _imports(PACKAGE / f"{name}.py") == set()
    for path in FILES:
        assert "kernels" not in _imports(path) or _room(path) in ("ops", "kernels")


def test_every_room_says_in_its_docstring_what_it_may_import():
    for folder in sorted({path.parent for path in FILES} - {PACKAGE}):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        assert "ay import" in text, f"{folder.name}/__init__.py"


def _functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_an_import_inside_a_function_says_why_it_is_there(path):
    """In a comment on its line or above it. In cli.py the docstring on top says it for all."""
    if path.name == "cli.py":
        return
    lines = path.read_text().splitlines()
    for function in _functions(ast.parse(path.read_text())):
        for node in ast.walk(function):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                start = node.lineno - 1
                while lines[start - 1].lstrip().startswith(("from ", "import ")):
                    start -= 1  # a group of imports has one reason, above its first line
                assert any("#" in line for line in lines[start - 1 : node.end_lineno]), f"{path.name}:{node.lineno}"


def test_the_package_is_imported_without_torch():
    code = "import sys, hsivi_fast, hsivi_fast.cli; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_kernels_is_a_link_without_init():
    link = PACKAGE / "kernels"
    assert link.is_symlink() and link.resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_need_torch_and_triton_alone_and_no_word_of_the_method():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, path.name
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {name.split(".")[0] for name in names} <= {"functools", "math", "torch", "triton"}, path.name
        for word in ("student", "teacher", "score_net", "tau", "eta", "hsivi"):
            assert word not in path.read_text().lower().replace("beta", "").replace("theta", "").split(), (
                f"{path.name} says {word}"
            )


def test_a_public_function_has_no_module_s_name():
    modules = {path.stem for path in PACKAGE.rglob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        functions = {
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        }
        functions -= (
            {"teacher", "convert", "export", "report"} if path.name == "cli.py" else set()
        )  # there, names of commands
        assert not functions & modules, f"{path.name}: {functions & modules}"


def test_an_install_has_configs_assets_and_kernels(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build",
            "--build-base",
            str(tmp_path / "base"),
            "--build-lib",
            str(tmp_path / "lib"),
            "egg_info",
            "--egg-base",
            str(tmp_path),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    built = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    for path in [
        *ROOT.glob("configs/*.yaml"),
        *ROOT.glob("configs/*.json"),
        *PACKAGE.glob("assets/*"),
        *ROOT.glob("kernels/*.py"),
        *ROOT.glob("kernels/*.md"),
    ]:
        folder = "assets" if path.parent.name == "assets" else path.parent.name
        assert f"hsivi_fast/{folder}/{path.name}" in built
    assert {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")} <= built


def test_no_large_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            assert (ROOT / name).stat().st_size < 5_000_000, name
