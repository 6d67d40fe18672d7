"""Programming languages by file name, and for scripts by their first line. Other files are not used as documents."""

from __future__ import annotations

import re
from pathlib import PurePath

NOTEBOOK = "jupyter-notebook"
_EXTENSIONS = {
    "ada": "adb ads",
    "asciidoc": "adoc asciidoc",
    "assembly": "asm s",
    "astro": "astro",
    "awk": "awk",
    "batch": "bat cmd",
    "c": "c h",
    "c++": "cc cpp cxx c++ hh hpp hxx h++ ipp inl tpp ixx cppm",
    "c#": "cs csx",
    "clojure": "clj cljc cljs",
    "cmake": "cmake",
    "coffeescript": "coffee",
    "crystal": "cr",
    "css": "css scss sass less",
    "cuda": "cu cuh",
    "cython": "pyx pxd pxi",
    "dart": "dart",
    "dockerfile": "dockerfile containerfile",
    "elixir": "ex exs heex",
    "elm": "elm",
    "erlang": "erl hrl",
    "f#": "fs fsi fsx",
    "flatbuffers": "fbs",
    "fortran": "f f90 f95 f03 f08 for",
    "gdscript": "gd",
    "glsl": "glsl frag vert comp geom",
    "go": "go",
    "graphql": "graphql gql",
    "groovy": "groovy gradle",
    "haskell": "hs lhs",
    "hcl": "tf tfvars hcl",
    "hlsl": "hlsl fx",
    "html": "html htm xhtml ejs hbs",
    "ini": "ini cfg conf properties",
    "java": "java",
    "javascript": "js jsx mjs cjs",
    "jinja": "jinja jinja2 j2",
    "json": "json jsonc json5",
    NOTEBOOK: "ipynb",
    "julia": "jl",
    "just": "just",
    "kotlin": "kt kts",
    "lisp": "lisp lsp cl el scm ss rkt",
    "lua": "lua luau",
    "makefile": "mk mak make",
    "markdown": "md markdown mdx rmd qmd",
    "metal": "metal",
    "nim": "nim nims",
    "nix": "nix",
    "objective-c": "m mm",
    "ocaml": "ml mli",
    "org": "org",
    "pascal": "pas pp",
    "perl": "pl pm",
    "php": "php phtml",
    "powershell": "ps1 psm1 psd1",
    "prisma": "prisma",
    "protobuf": "proto",
    "python": "py pyi pyw",
    "r": "r",
    "restructuredtext": "rst",
    "ruby": "rb rake gemspec erb",
    "rust": "rs",
    "scala": "scala sc sbt",
    "shell": "sh bash zsh fish ksh bats",
    "solidity": "sol",
    "sql": "sql",
    "starlark": "bzl bazel star",
    "svelte": "svelte",
    "swift": "swift",
    "tcl": "tcl",
    "tex": "tex",
    "text": "txt",
    "thrift": "thrift",
    "toml": "toml",
    "typescript": "ts tsx mts cts",
    "verilog": "v sv svh vh",
    "vhdl": "vhd vhdl",
    "vim": "vim",
    "visual-basic": "vb bas",
    "vue": "vue",
    "wgsl": "wgsl",
    "xml": "xml xsd xsl xslt xaml csproj fsproj vbproj props targets",
    "yaml": "yaml yml",
    "zig": "zig",
}
_NAMES = {
    "cmake": "cmakelists.txt",
    "dockerfile": "dockerfile containerfile",
    "go-module": "go.mod go.work",
    "groovy": "jenkinsfile",
    "just": "justfile",
    "makefile": "makefile gnumakefile",
    "meson": "meson.build meson.options meson_options.txt",
    "python": "sconstruct sconscript snakefile wscript",
    "ruby": "rakefile gemfile podfile vagrantfile brewfile fastfile guardfile",
    "starlark": "tiltfile",
    "text": "readme changelog changes contributing",
    "toml": "pipfile",
}
_INTERPRETERS = {
    "awk": "awk gawk mawk nawk",
    "elixir": "elixir",
    "erlang": "escript",
    "groovy": "groovy",
    "haskell": "runhaskell runghc stack",
    "javascript": "node nodejs bun zx",
    "julia": "julia",
    "just": "just",
    "kotlin": "kotlin",
    "lisp": "guile racket sbcl clisp emacs",
    "lua": "lua luajit",
    "makefile": "make gmake",
    "ocaml": "ocaml",
    "perl": "perl",
    "php": "php",
    "powershell": "pwsh",
    "python": "python pypy ipython uv",
    "r": "rscript",
    "ruby": "ruby jruby",
    "scala": "scala amm",
    "shell": "sh bash zsh ksh dash ash fish bats",
    "swift": "swift",
    "tcl": "tclsh wish expect",
    "typescript": "deno ts-node tsx",
}


def _by_word(table: dict[str, str]) -> dict[str, str]:
    return {word: language for language, words in table.items() for word in words.split()}


_BY_EXTENSION, _BY_NAME, _BY_INTERPRETER = map(_by_word, (_EXTENSIONS, _NAMES, _INTERPRETERS))
# Names that are often followed by a dot and another word: Dockerfile.dev.
_BY_STEM = {name: _BY_NAME[name] for name in ("dockerfile", "containerfile", "makefile", "jenkinsfile")}
# Every other language, in particular a natural one such as "en", is treated as prose.
CODE = (frozenset(_EXTENSIONS) | frozenset(_NAMES)) - {"asciidoc", "markdown", "org", "restructuredtext", "text"}
_SHEBANG = re.compile(rb"#![ \t]*([^\r\n]*)")
_ASSIGNMENT = re.compile(r"\w+=")


def language_of(path: str) -> str | None:
    """The language of a file by its name, or None where the name is not one of source code or text."""
    name = PurePath(path).name.lower()
    stem, dot, extension = name.rpartition(".")
    return _BY_NAME.get(name) or (_BY_EXTENSION.get(extension) or _BY_STEM.get(stem.partition(".")[0]) if dot else None)


def language_of_script(head: bytes) -> str | None:
    """The language of a script by the interpreter in its first line (`#!`), or None where that names no known one."""
    line = _SHEBANG.match(head)
    if line is None:
        return None
    words = line[1].decode("utf-8", "replace").split()
    names = [word.rpartition("/")[2] for word in words]
    if names[:1] == ["env"]:  # its options and variables come before the interpreter
        names = [name for word, name in zip(words, names, strict=True) if not word.startswith("-")][1:]
        names = [name for name in names if not _ASSIGNMENT.match(name)]
    return _BY_INTERPRETER.get(names[0].lower().rstrip("0123456789.")) if names else None
