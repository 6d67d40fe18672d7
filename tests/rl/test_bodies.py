"""Bodies of functions: where they end, what they may reach for, and what they earn."""

from __future__ import annotations

import ast
import importlib
import random
import threading
import warnings

import pytest

from smallcoder_jax.config import RLConfig
from smallcoder_jax.data.conversations.snippets import draw_callable
from smallcoder_jax.rl import bodies, questions
from smallcoder_jax.rl.questions import Body
from smallcoder_jax.rl.rewards import CheckedReward
from smallcoder_jax.rl.rollouts import Answer, Question
from smallcoder_jax.sandbox import run as sandbox
from smallcoder_jax.tokenizers.bytes import ByteTokenizer

HEAD = 'def median(data):\n    r"""\n    >>> median([1, 2, 3])\n    2\n    """\n'
MEDIAN = Body(HEAD, (("median([4, 7])", "5.5"), ("median([9, 1, 2])", "2"), ("median([8])", "8")), "statistics")
RIGHT = """\
    data = sorted(data)
    n = len(data)
    return data[n // 2] if n % 2 else (data[n // 2 - 1] + data[n // 2]) / 2
"""


def worth(text: str, question: Body = MEDIAN, *, ended: bool = True, rl: RLConfig | None = None) -> float:
    tokenizer = ByteTokenizer()
    answer = Answer(Question((1,), question), tuple(tokenizer.encode(text)), ended)
    return float(CheckedReward(tokenizer, rl or RLConfig())([answer])[0])


@pytest.mark.parametrize(
    "body",
    [
        RIGHT,
        RIGHT.rstrip("\n"),
        "# Its middle.\n" + RIGHT,
        "    data = list(data)\n# A comment in the first column,\n#another.\n\n\n" + RIGHT,
        '    """\nA string that goes on\nin the first column.\n    """\n' + RIGHT,
        "    text = '''\ndef other():\n'''\n" + RIGHT,
        "    data = [\nx for x in\ndata\n]\n" + RIGHT,
        "    data = \\\ndata\n" + RIGHT,
        "    marks = 'a\x0cb\u2028c\x85d\x1ce'\n" + RIGHT,
        "\x0c" + RIGHT,
        RIGHT.replace("\n", "\r\n"),
        "    if not data:\n        raise ValueError\n  \n" + RIGHT,
    ],
)
@pytest.mark.parametrize(
    "rest", ["", "\n\nprint(median([1]))\n", "\n# The end.\n\n\ndef other(:\n    '''", "It is done."]
)
def test_a_body_ends_where_python_ends_it(body: str, rest: str) -> None:
    found, left = bodies.split_body(HEAD, body + ("" if body.endswith("\n") or not rest else "\n") + rest)
    assert found.strip() == body.replace("\r\n", "\n").strip()
    assert left.strip() == rest.strip()
    module: dict[str, object] = {}
    exec(compile(HEAD + found, "<test>", "exec"), module)
    function = module["median"]
    assert callable(function)
    assert function([4, 7]) == 5.5


@pytest.mark.parametrize(
    "text", ["    return (1,\n", "    '''", "    if x:\n        y\n      z\n", "    return $\n", "    \0"]
)
def test_what_is_no_python_is_all_body_and_worth_nothing(text: str) -> None:
    assert bodies.split_body(HEAD, text) == (text, "")
    assert worth(text) == 0.0


def test_lines_that_the_function_does_not_own_are_no_body() -> None:
    assert bodies.split_body(HEAD, "return 1\n") == ("", "return 1\n")
    assert bodies.split_body(HEAD, "\n\ndef other():\n    return 1\n") == ("", "\n\ndef other():\n    return 1\n")
    assert bodies.split_body(HEAD, "") == ("", "")


def test_what_a_body_earns() -> None:
    assert worth(RIGHT) == 1.0
    assert worth("    return sorted(data)[len(data) // 2]\n") == 0.5  # two of three, of which a constant has one
    assert worth("    return data[0]\n") == 0.0
    assert worth("    raise SystemExit(0)\n") == 0.0
    assert worth("") == 0.0
    assert worth("    while True:\n        raise KeyboardInterrupt\n") == 0.0


def test_text_behind_a_body_and_a_missing_end_have_their_price() -> None:
    more = RIGHT + "\n\nprint(median([1]))\nraise SystemExit\n"
    assert worth(more) == pytest.approx(0.9)
    assert worth(more, ended=False) == pytest.approx(0.4)
    assert worth(RIGHT, ended=False) == pytest.approx(0.5)
    assert worth("    return 0\n", ended=False) == 0.0
    free = RLConfig(surplus_price=0.0, cut_off_price=0.0)
    assert worth(more, ended=False, rl=free) == 1.0


@pytest.mark.parametrize(
    "value",
    [
        "class Same(int):\n        __eq__ = lambda *_: True\n        __hash__ = int.__hash__\n    return Same(2)",
        "class Two(int):\n        __repr__ = lambda _: '2'\n    return Two(2)",
        "class Two(float):\n        pass\n    return Two(2)",
        "return True",
        "return 1.0",
        "print(1)",
        "class Any:\n        def __repr__(self):\n            return '1'\n    return Any()",
    ],
)
def test_a_value_has_to_be_of_the_right_type(value: str) -> None:
    one = Body("def one(x):\n", (("one(1)", "1"), ("one(2)", "1"), ("one(3)", "2")), "nowhere")
    assert worth("    return 1 if x < 3 else 2\n", one) == 1.0
    assert worth(f"    if x > 2:\n        return 2\n    {value}\n", one) == 0.0


def test_a_constant_earns_nothing() -> None:
    """Also the one that the docstring shows, or that is right most of the time."""
    leap = Body("def leap(y):\n", (("leap(4)", "True"), ("leap(5)", "False"), ("leap(6)", "False")), "calendar")
    assert worth("    return False\n", leap) == 0.0
    assert worth("    return True\n", leap) == 0.0
    assert worth("    return y % 4 == 0\n", leap) == 1.0
    assert worth("    return 2\n") == 0.0


REACHING = [
    "    from statistics import median\n    return median(data)",
    "    import statistics as s\n    return s.median(data)",
    "    from statistics import *\n    return median(data)",
    "    from fractions import statistics\n    return statistics.median(data)",
    "    import importlib\n    return importlib.import_module('statistics').median(data)",
    "    return __import__('statistics').median(data)",
    "    return __builtins__['__import__']('statistics').median(data)",
    "    import sys\n    return sys.modules['statistics'].median(data)",
    "    import re\n    return re.enum.sys.modules['statistics'].median(data)",
    "    import re as r\n    m = r\n    return m.enum.sys.modules['statistics'].median(data)",
    "    from re import enum\n    return enum.sys.modules['statistics'].median(data)",
    "    import re\n    match re:\n        case object(enum=e):\n            return e.sys.modules['statistics']",
    "    from collections import _sys\n    return _sys.modules['statistics'].median(data)",
    "    return eval('__import__(\"statistics\").median(data)')",
    "    exec('from statistics import median as m', globals())\n    return m(data)",
    "    return globals()['__builtins__']['__import__']('statistics').median(data)",
    "    return getattr(median, '__glo' + 'bals__')['__builtins__']['__import__']('statistics').median(data)",
    "    return median.__globals__['__builtins__']['__import__']('statistics').median(data)",
    "    return print.__self__.__import__('statistics').median(data)",
    "    f = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'BuiltinImporter'][0]\n"
    "    return f.load_module('statistics').median(data)",
    "    g = (g.gi_frame.f_back.f_back for _ in [1])\n    return next(g).f_globals",
    "    try:\n        1 / 0\n    except Exception as e:\n        return e.__traceback__.tb_frame.f_back.f_locals",
    "    import inspect\n    return eval(inspect.getsource(inspect))",
    "    exec(open('/usr/lib/python3.11/statistics.py').read(), globals())\n    return median(data)",
    "    import os\n    return os.read(os.open('/usr/lib/python3.11/statistics.py', 0), 9)",
    "    from . import statistics\n    return statistics.median(data)",
]


@pytest.mark.parametrize("body", REACHING)
def test_a_body_that_reaches_for_the_true_function_earns_nothing(body: str) -> None:
    assert bodies.overreach(MEDIAN, body) is not None
    assert worth(body) == 0.0


HONEST = [
    "    raise TypeError(type(data).__name__)",
    "    import math\n    return math.floor(data[0])",
    "    from collections import Counter\n    return Counter(data).copy().most_common(1)[0]",
    "    import re, itertools\n    return re.sub('a', 'b', ''.join(itertools.chain(data)))",
    "    class Box:\n        def __init__(self, x):\n            self.x = x\n    return Box(data).x",
    "    return [x.lower().strip() for x in data if isinstance(x, str)]",
    "    try:\n        return data.copy()\n    except AttributeError as error:\n        return str(error)",
]


@pytest.mark.parametrize("body", HONEST)
def test_an_honest_body_reaches_for_nothing(body: str) -> None:
    assert bodies.overreach(MEDIAN, body) is None


def test_what_may_be_imported_works_where_a_body_runs() -> None:
    """Also what that imports only when it is called."""
    body = (
        "    import re, math\n    from collections import Counter, namedtuple\n    from itertools import chain\n"
        "    Pair = namedtuple('Pair', 'a b')\n    assert Pair(1, 2)._replace(a=3).a == math.floor(3.5)\n"
        "    assert Counter('aab').most_common(1) == [('a', 2)] and re.sub('(?i)A', 'b', 'a') == 'b'\n"
        "    assert list(chain([1], [2])) == [1, 2] and 'a'.encode('latin-1').decode('ascii') == 'a'\n"
    )
    assert worth(body + RIGHT) == 1.0


@pytest.mark.parametrize(
    "body",
    [
        "    from statistics import median\n    return median(data)",
        "    import sys\n    sys.modules.pop('statistics')\n    from statistics import median as m\n    return m(data)",
        "    text = open('/proc/self/environ').read()\n    return 5.5",
        "    import statistics\n    text = open(statistics.__file__).read()\n    return 5.5",
        "    import inspect\n    return 5.5",
        "    import os\n    return len(os.popen('echo 12345').read()) - 0.5",
    ],
)
def test_where_a_body_runs_the_true_function_is_out_of_reach(body: str) -> None:
    """Though what it may name had not been looked at."""
    assert bodies._held(MEDIAN, body) == 0


@pytest.mark.parametrize("module", ["operator", "_operator"])
def test_a_module_that_is_loaded_anyway_is_taken_away(module: str) -> None:
    question = Body("def sub(a, b):\n", (("sub(5, 3)", "2"), ("sub(9, 1)", "8")), "operator")
    assert bodies._held(question, f"    from {module} import sub\n    return sub(a, b)\n") == 0
    assert bodies._held(question, "    return a - b\n") == 2


def test_no_question_has_its_function_within_reach() -> None:
    """In what a body may import, or in what stands before it."""
    sides = [questions.from_code(ByteTokenizer(), side=side, draws=3000) for side in ("train", "validation")]
    asked = [question.facts for side in sides for question in side]
    assert len({question.module for question in asked}) > 10
    for question in asked:
        (name,) = {call.partition("(")[0] for call, _ in question.examples}
        true = getattr(importlib.import_module(question.module), name)
        for module in (*bodies.IMPORTABLE, *bodies._imported(question.before + "    pass\n")):
            assert module != question.module
            members = vars(importlib.import_module(module)).items()
            assert not [member for member, value in members if value is true], (question.module, name, module)
        assert len({value for _, value in question.examples}) > 1
        assert question.before.endswith("\n")
        for call, value in question.examples:
            assert sandbox.same_value(eval(call, {name: true}), ast.literal_eval(value))


def signature(node: ast.FunctionDef) -> str:
    return f"{node.name}({ast.unparse(node.args)})"


def test_true_bodies_of_the_questions_from_code_earn_all() -> None:
    """On either side of the split; and no function is on both."""
    true = {}
    rng = random.Random(0)
    for _ in range(2000):
        snippet = draw_callable(rng)[0]
        tree = ast.parse(snippet.code)
        (node,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == snippet.name)
        lines = snippet.code.split("\n")[node.body[0].lineno - 1 : node.end_lineno]
        true[signature(node)] = "\n".join(lines) + "\n"
    names: dict[str, set[str]] = {}
    for side in ("train", "validation"):
        found = questions.from_code(ByteTokenizer(), side=side, draws=3000)
        names[side] = set()
        for question in found:
            before = question.facts.before
            assert ByteTokenizer().decode(list(question.ids)) == before
            node = [n for n in ast.parse(before).body if isinstance(n, ast.FunctionDef)][-1]
            if node.name not in names[side]:
                body, rest = bodies.split_body(before, true[signature(node)])
                assert not rest
                assert bodies.share_right(question.facts, body) == 1.0, before
            names[side].add(node.name)
        assert len(found) >= (200 if side == "train" else 10)  # Python 3.13 has fewer such functions than 3.11
    assert names["train"].isdisjoint(names["validation"])


def test_filters_of_warnings_outlive_many_threads() -> None:
    before = list(warnings.filters)
    threads = [
        threading.Thread(target=lambda: [bodies.tree_of("x = '\\d'\n" * 50) for _ in range(50)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
