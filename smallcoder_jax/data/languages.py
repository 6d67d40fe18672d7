"""Programming languages by file name. A file with another name is not taken for a document."""

from __future__ import annotations

from pathlib import PurePath

_EXTENSIONS = {
    "ada": "adb ads",
    "assembly": "asm s",
    "batch": "bat cmd",
    "c": "c h",
    "c++": "cc cpp cxx hh hpp hxx ipp",
    "c#": "cs",
    "clojure": "clj cljc cljs",
    "cmake": "cmake",
    "css": "css scss sass less",
    "cuda": "cu cuh",
    "cython": "pyx pxd",
    "dart": "dart",
    "elixir": "ex exs",
    "elm": "elm",
    "erlang": "erl hrl",
    "f#": "fs fsi fsx",
    "fortran": "f f90 f95 f03 for",
    "glsl": "glsl frag vert",
    "go": "go",
    "groovy": "groovy gradle",
    "haskell": "hs",
    "html": "html htm",
    "java": "java",
    "javascript": "js jsx mjs cjs",
    "json": "json",
    "julia": "jl",
    "kotlin": "kt kts",
    "lisp": "lisp lsp el scm rkt",
    "lua": "lua",
    "markdown": "md markdown",
    "nim": "nim",
    "nix": "nix",
    "objective-c": "m mm",
    "ocaml": "ml mli",
    "pascal": "pas pp",
    "perl": "pl pm",
    "php": "php",
    "powershell": "ps1 psm1",
    "protobuf": "proto",
    "python": "py pyi",
    "r": "r",
    "restructuredtext": "rst",
    "ruby": "rb",
    "rust": "rs",
    "scala": "scala",
    "shell": "sh bash zsh",
    "solidity": "sol",
    "sql": "sql",
    "swift": "swift",
    "tcl": "tcl",
    "tex": "tex",
    "text": "txt",
    "toml": "toml",
    "typescript": "ts tsx",
    "verilog": "v sv svh",
    "vhdl": "vhd vhdl",
    "vim": "vim",
    "xml": "xml",
    "yaml": "yaml yml",
    "zig": "zig",
}
_BY_EXTENSION = {extension: language for language, names in _EXTENSIONS.items() for extension in names.split()}
_BY_NAME = {"makefile": "makefile", "dockerfile": "dockerfile", "cmakelists.txt": "cmake", "rakefile": "ruby"}
# Anything else, a natural language such as "en" in particular, is judged as prose.
CODE = (frozenset(_EXTENSIONS) | frozenset(_BY_NAME.values())) - {"text", "markdown", "restructuredtext"}


def language_of(path: str) -> str | None:
    """The language of a file by its name, or None where the name is not that of source code or text."""
    name = PurePath(path).name.lower()
    return _BY_NAME.get(name) or _BY_EXTENSION.get(name.rpartition(".")[2] if "." in name else "")
