"""README.md, docs/ and the other guides point at what exists, and say what the code says."""

import ast
import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

from smallcoder_jax.base import errors

ROOT = Path(__file__).resolve().parents[1]
GUIDES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
RECORDS = ("LOG.md", "benchmarks.md")  # of what was, under the names of its time
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACE = re.compile(r"`([\w./]+\.py):([\w.]+)`")
COMMAND = re.compile(r"python -m ([\w.]+)")


def prose_of(path: Path) -> str:
    return FENCE.sub("", path.read_text())


def anchors_of(path: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    seen: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", prose_of(path), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
        seen[slug] += 1
    return anchors


def names_of(path: Path) -> set[str]:
    """Functions, classes and their methods, and what is assigned at the top of a file."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("page", GUIDES, ids=lambda path: path.name)
def test_links_images_and_anchors_lead_to_something(page: Path) -> None:
    for link in LINK.findall(prose_of(page)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link} leads to nothing"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name}: {link}: there is no such heading"


@pytest.mark.parametrize("name", ["architecture.md", "adding.md"])
def test_places_in_the_code_exist(name: str) -> None:
    places = PLACE.findall((ROOT / "docs" / name).read_text())
    assert len(places) > 20
    for file, symbol in places:
        assert (ROOT / file).is_file(), f"{name}: there is no {file}"
        assert symbol in names_of(ROOT / file), f"{name}: {file} has no {symbol}"


@pytest.mark.parametrize("page", [page for page in GUIDES if page.name not in RECORDS], ids=lambda path: path.name)
def test_commands_are_modules(page: Path) -> None:
    for module in COMMAND.findall(page.read_text()):
        assert importlib.util.find_spec(module) is not None, f"{page.name}: python -m {module} does not exist"


def test_every_exit_code_is_explained() -> None:
    table = (ROOT / "docs" / "run-folder.md").read_text().split("## Exit codes")[1]
    explained = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert explained >= {0, 130, 134} | {code for name, code in vars(errors).items() if name.startswith("EXIT_")}


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert all(len(line) <= 120 for line in lines if not line.startswith("|"))
    assert (ROOT / "docs" / "images" / "quickstart.png").stat().st_size < 150_000
