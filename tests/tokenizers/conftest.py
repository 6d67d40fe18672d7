"""One small sentencepiece tokenizer, trained once for all tests here."""

import asyncio
from pathlib import Path

import pytest

from smallcoder_jax.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

HARD_TEXTS = {
    "empty": "",
    "newline": "\n",
    "spaces": "  ",
    "tabs": "\t\tif x:\n\t\t\treturn\t1\n",
    "crlf": "def f():\r\n    pass\r\n\r\n",
    "emoji": "# \U0001f600 \U0001f469\u200d\U0001f467 é 日本語\n",
    "specials as text": "</s> <s><pad><unk> <|fim_prefix|>x<|fim_middle|> <|im_end|> <tool_call> <|spare_0|>",
    "byte pieces as text": "<0x0A> <0xE2>",
    "very long line": "x = [" + ", ".join(map(str, range(20_000))) + "]",
    "long whitespace": "a" + " " * 3000 + "b" + "\n" * 500 + " " * 17 + "c",
    "control characters": "a\0b\x0bc\x1bd\x7f\u2028e\u0085f\ufeffg",
    "ends in indentation": "class A:\n    def f(self):\n        ",
    "replacement and private": "\ufffd\ue00a\ue009\U0010ffff",
}


@pytest.fixture(scope="session")
def code() -> list[str]:
    folder = Path(asyncio.__file__).parent
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]


@pytest.fixture(scope="session")
def trained(code: list[str]) -> SentencePieceTokenizer:
    return train_sentencepiece(code, vocab_size=1200, max_bytes=10_000_000)
