"""When two texts are the same document."""

import pytest

from smallcoder_jax.data.sources.document import Document, normalized

TEXT = "def f(x):\n\treturn x\n"


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + TEXT,
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n", "\r"),
        TEXT.replace("\n", " \n"),
        TEXT.replace("\n", "\t \r\n"),
        TEXT + "\n \n",
        TEXT.rstrip(),
    ],
)
def test_what_editors_and_systems_change_makes_no_other_document(text: str) -> None:
    assert normalized(text) == normalized(TEXT) == TEXT
    assert Document(text, "a").identity == Document(TEXT, "b").identity
    assert Document(text, "a").hash != Document(TEXT, "a").hash


@pytest.mark.parametrize("text", [" " + TEXT, TEXT.replace("\t", "    "), "\n" + TEXT, TEXT.replace("x", "y"), ""])
def test_other_texts_are_other_documents(text: str) -> None:
    assert Document(text, "a").identity != Document(TEXT, "a").identity
