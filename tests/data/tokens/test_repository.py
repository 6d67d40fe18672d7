from smallcoder_jax.data.sources.document import Document
from smallcoder_jax.data.tokens.repository import dependency_order, group_repositories


def order(files: dict[str, str]) -> list[str]:
    return [file.path for file in dependency_order([Document(text, "s", path, "r") for path, text in files.items()])]


def test_imported_files_come_first() -> None:
    files = {
        "pkg/__init__.py": "from pkg.main import run\n",
        "pkg/a_main.py": "import os, pkg.z_base as base\n",
        "pkg/main.py": "from . import m_mid\nfrom .a_main import (\n    x,\n    y,\n)\n",
        "pkg/m_mid.py": "from pkg import z_base\n",
        "pkg/z_base.py": "import sys\n",
        "pkg/readme.md": "import pkg.main\n",
    }
    assert order(files) == [
        "pkg/readme.md",
        "pkg/z_base.py",
        "pkg/a_main.py",
        "pkg/m_mid.py",
        "pkg/main.py",
        "pkg/__init__.py",
    ]


def test_a_star_import_is_of_the_module() -> None:
    assert order({"a.py": "from z import *\n", "p/b.py": "from .y import *\n", "p/y.py": "", "z.py": ""}) == [
        "p/y.py",
        "p/b.py",
        "z.py",
        "a.py",
    ]


def test_packages_below_a_source_folder() -> None:
    assert order({"src/app/a.py": "from app.z import f\n", "src/app/z.py": "f = 1\n"}) == [
        "src/app/z.py",
        "src/app/a.py",
    ]


def test_cycles_and_other_languages_go_by_path() -> None:
    assert order({"b.py": "import a\n", "a.py": "import b\n", "c.rs": "use b;\n"}) == ["c.rs", "a.py", "b.py"]
    assert order({"z.go": "", "y.go": "", "x.go": ""}) == ["x.go", "y.go", "z.go"]


def test_an_import_inside_text_or_of_itself_counts_for_nothing() -> None:
    assert order({"a.py": "x = '''\n  import b\n'''\nimport a\n", "b.py": ""}) == ["a.py", "b.py"]


def test_groups() -> None:
    documents = [Document("1", "s", "b", "two"), Document("2", "s", "x"), Document("3", "s", "a", "one")]
    documents.append(Document("4", "s", "a", "two"))
    groups = [[document.text for document in group] for group in group_repositories(documents)]
    assert groups == [["3"], ["4", "1"], ["2"]]
