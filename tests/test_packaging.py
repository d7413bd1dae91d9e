"""What is installed, what it needs, and what importing it costs."""

import ast
import importlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import langchain_stars

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "langchain_stars"
CORE = {"langchain-core", "langgraph", "pydantic", "torch", "transformers"}
# Import names that torch, transformers and pydantic ask for and show in their own interfaces, and those of
# extras with the modules that may use them.
BROUGHT = {"huggingface_hub", "jinja2", "numpy", "safetensors", "tokenizers", "typing_extensions"}
OF_EXTRAS = {"langchain": {"middleware.py"}, "matplotlib": {"benchmark.py"}, "rich": {"cli.py"}}


def run_python(code: str) -> str:
    """Returns what a fresh interpreter prints."""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def code_of(path: Path) -> str:
    """Returns what stands in code fences and between backticks."""
    text = path.read_text()
    fences = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join([*fences, *re.findall(r"`([^`\n]+)`", text)])


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    [path] = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    assert Path(path).stat().st_size < 100_000_000, "package indexes take no more by default"
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_importing_the_package_imports_none_of_its_dependencies():
    loaded = set(run_python("import sys, langchain_stars; print(*sys.modules)").split())
    assert "langchain_stars" in loaded
    heavy = {"langchain_core", "langgraph", "numpy", "pydantic", "torch", "transformers"}
    assert not loaded & heavy


def test_importing_every_module_opens_no_connection_and_starts_no_thread():
    output = run_python(
        "import importlib, pkgutil, sys, threading\n"
        "used = []\n"
        "events = ('socket.connect', 'socket.getaddrinfo', 'socket.sendto')\n"
        "sys.addaudithook(lambda event, _: used.append(event) if event in events else None)\n"
        "import langchain_stars\n"
        "found = pkgutil.walk_packages(langchain_stars.__path__, 'langchain_stars.')\n"
        "names = [module.name for module in found]\n"
        "for name in names:\n"
        "    importlib.import_module(name)\n"
        "print(len(names), used, [thread.name for thread in threading.enumerate()])\n"
    )
    count, rest = output.strip().split(" ", 1)
    assert int(count) > 10
    assert rest == "[] ['MainThread']"


def test_every_public_name_is_there():
    for name in langchain_stars.__all__:
        assert getattr(langchain_stars, name) is not None
        assert name in dir(langchain_stars)
    assert {"ChatStars", "as_reward", "create_guarded_chat"} <= set(langchain_stars.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = langchain_stars.nothing


def test_the_version_is_that_of_the_project(project: dict[str, Any]):
    assert Version(langchain_stars.__version__) == Version(project["version"])


def test_the_command_is_a_function_of_the_package(project: dict[str, Any]):
    module, _, function = project["scripts"]["langchain-stars"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile):
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    on_disk = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == on_disk
    assert "langchain_stars/py.typed" in inside


def test_the_wheel_brings_bundled_models_whose_weights_run_no_code(wheel: zipfile.ZipFile):
    bundled = [Path(name) for name in wheel.namelist() if "/bundled/" in name]
    kinds = {path.suffix for path in bundled if path.name not in {"LICENSE", "__init__.py"}}
    assert ".safetensors" in kinds
    assert kinds <= {".jinja", ".json", ".md", ".safetensors", ".txt"}


def test_the_wheel_asks_for_five_packages_and_no_more(wheel: zipfile.ZipFile):
    [metadata] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    headers = HeaderParser().parsestr(wheel.read(metadata).decode())
    requirements = [Requirement(line) for line in headers.get_all("Requires-Dist", [])]
    needed = {canonicalize_name(each.name) for each in requirements if each.marker is None}
    assert needed == CORE
    assert headers["Requires-Python"] == ">=3.11"


def test_the_source_archive_can_be_tested_and_holds_no_environment(tmp_path: Path):
    [path] = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(path) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {
        "LICENSE",
        "Makefile",
        "README.md",
        "constraints.txt",
        "langchain_stars/__init__.py",
        "pyproject.toml",
        "tests/conftest.py",
    } <= inside
    assert not [name for name in inside if name.startswith((".venv", ".git/"))]


def test_every_dependency_has_bounds_that_its_tested_version_meets(project: dict[str, Any]):
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    tested = {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}
    extras = project["optional-dependencies"]
    requirements = [
        *project["dependencies"],
        *(line for extra in extras.values() for line in extra),
    ]
    for line in requirements:
        requirement = Requirement(line)
        if requirement.name == project["name"]:
            assert requirement.extras <= set(extras)
            continue
        operators = {each.operator for each in requirement.specifier}
        assert operators in ({">=", "<"}, {"=="}), line
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), line


def test_the_package_imports_nothing_that_it_does_not_ask_for():
    allowed = {name.replace("-", "_") for name in CORE} | BROUGHT | {"langchain_stars"}
    allowed |= sys.stdlib_module_names
    sources = list(PACKAGE.rglob("*.py"))
    assert len(sources) > 10
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{source.name} has a relative import"
                roots = {str(node.module).partition(".")[0]}
            else:
                continue
            for root in roots - allowed:
                assert source.name in OF_EXTRAS.get(root, set()), f"{source.name} imports {root}"


def test_the_commands_of_the_readme_exist_and_are_what_is_checked():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    readme = set(re.findall(r"\bmake ([a-z]+)\b", code_of(ROOT / "README.md")))
    checked = set(re.findall(r"^make ([a-z]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= readme <= targets
    assert {"demo", "lint", "test"} <= checked <= targets
