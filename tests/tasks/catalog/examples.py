"""A few invented rows of every task, with the fields that its data set has."""

from typing import Any

from moeq.tasks.task import DataRow


def _science(question: str, texts: list[str], key: str, labels: str = "ABCD") -> dict[str, Any]:
    return {
        "id": question[:4],
        "question": question,
        "choices": {"text": texts, "label": list(labels)},
        "answerKey": key,
    }


def _subject(subject: str, question: str, answer: int) -> dict[str, Any]:
    choices = [f"{question[:2]}{number}" for number in range(4)]
    return {"question": question, "subject": subject, "choices": choices, "answer": answer}


def _function(name: str, task_id: int, code: str) -> dict[str, Any]:
    tests = [f"assert {name}({number}) == {number + 1}" for number in range(4)]
    return {"task_id": task_id, "text": f"Write {name}.", "code": code, "test_list": tests, "test_setup_code": ""}


ARC = [
    _science("What melts ice?", ["heat", "cold", "wind", "sand"], "A"),
    _science("Which is 3?", ["one", "two", "three"], "3", "123"),
    _science("Two\nlines?", ["a b", "c", "it's", '"d"'], "D"),
]
WIKITEXT = [
    "", " = Lake Blue = \n", "", " Lake Blue is 3 @,@ 000 @.@ 5 m deep , and \" cold \" . \n", " = = Fish = = \n",
    " It has pike ; the lake 's pikes ( big ) are old ! \n", " = Hill = Side = \n", " N hills : see [ 1 ] \n",
]  # fmt: skip

ROWS: dict[str, list[DataRow]] = {
    "arc_challenge": ARC,
    "arc_easy": ARC,
    "boolq": [
        {"question": "is rain wet", "passage": "Rain -- Rain is water.", "idx": 0, "label": 1},
        {"question": "is sand wet", "passage": "Sand -- Sand is dry.\nMostly.", "idx": 1, "label": 0},
    ],
    "c4": [{"text": "Hello , world .\nIt 's me ."}, {"text": " Blue sky"}],
    "copa": [
        {"premise": "The glass fell.", "choice1": "It broke.", "choice2": "I sang.", "question": "effect", "label": 0},
        {"premise": "He ran. ", "choice1": "He sat.", "choice2": "He was late.", "question": "cause", "label": 1},
    ],
    "gsm8k": [
        {"question": "What is 1200 + 34?", "answer": "It is 1200 + 34 = <<1200+34=1234>>1234.\n#### 1,234"},
        {"question": "And 5 - 7?", "answer": "It is -2.\n#### -2"},
        {"question": "And 1 + 1?", "answer": "#### 2"},
    ],
    "hellaswag": [
        {
            "ind": 7, "activity_label": "Making tea", "ctx_a": "A woman boils water.", "ctx_b": "she",
            "endings": ["pours it.", "[step] Sings  loud. [title] End", "sleeps.", "runs."], "label": "0",
        },
        {
            "ind": 8, "activity_label": "Health", "ctx_a": "[header] How to rest [title] Lie down. [step] Sleep.",
            "ctx_b": "", "endings": [" Rest.", "Go.", "Eat.", "Read."], "label": "3",
        },
    ],
    "humaneval": [
        {
            "task_id": "T/0", "prompt": "def add(a, b):\n    \"\"\"Sum.\"\"\"\n", "entry_point": "add",
            "canonical_solution": "    return a + b\n",
            "test": "\ndef check(candidate):\n    assert candidate(1, 2) == 3\n",
        },
        {
            "task_id": "T/1", "prompt": "def one():\n", "entry_point": "one", "canonical_solution": "    return 1\n",
            "test": "def check(candidate):\n    assert candidate() == 1\n",
        },
    ],
    "lambada_openai": [{"text": "He took the red hat"}, {"text": "A dog.\n\n\"Sit,\" I\n\nsaid"}],
    "mathqa": [
        {
            "Problem": "what is 2 + 3 ?", "correct": "a",
            "options": "a ) 5 , b ) 27.5 , c ) rs . 1 , 000 , d ) 2 : 1 , e ) none",
        },
        {"Problem": "half of 8 ?", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 5 , e ) 4", "correct": "e"},
    ],
    "mbpp": [_function("inc", 11, "def inc(n):\r\n  return n + 1"), _function("next", 12, "next = lambda n: n + 1")],
    "mmlu": [
        _subject("us_foreign_policy", " Who signed? ", 1),
        _subject("anatomy", "Where is the ulna?\n(arm)", 0),
        _subject("us_foreign_policy", "When?", 3),
    ],
    "openbookqa": [
        {"id": "1", "question_stem": "A fire needs", "choices": ARC[0]["choices"], "answerKey": " B"},
        {"id": "2", "question_stem": "Plants", "choices": ARC[2]["choices"], "answerKey": "C"},
    ],
    "piqa": [
        {"goal": "Open a jar", "sol1": "twist it", "sol2": "tap it's \"lid\"", "label": 1},
        {"goal": "Dry\nsocks", "sol1": "air", "sol2": "water", "label": 0},
    ],
    "sciq": [
        {
            "question": "What is ice?", "distractor1": "air", "distractor2": "sand", "distractor3": "fire",
            "correct_answer": "water", "support": "\n Ice is water. ",
        },
        {
            "question": "Why?", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d",
            "support": "",
        },
    ],
    "sums": [{"text": f"{a} + {b} = {a + b}\n" if a + b != 3 else ""} for a in range(3) for b in range(3)],
    "wikitext": [{"text": line} for line in WIKITEXT],
    "winogrande": [
        {"sentence": "Ann thanked Eve because _ had helped .", "option1": "Ann", "option2": "Eve", "answer": "2"},
        {"sentence": "The cup beat the mug as _  was new.", "option1": "cup", "option2": "mug", "answer": "1"},
    ],
}  # fmt: skip

SHOTS: dict[str, list[DataRow]] = {
    "gsm8k": [{"question": f"What is {n} + {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(9)],
    # Of the split only the second to the fourth are shown.
    "mbpp": [_function(f"f{n}", n, f"def f{n}(n):\r\n    return n + 1") for n in range(1, 6)],
    "mmlu": [
        _subject(subject, f"{subject[0]}{number}?", number % 4)
        for number in range(6)
        for subject in ("anatomy", "us_foreign_policy")
    ],
}
# Variants of a task on the same rows.
SAME = {
    "c4_sample": "c4",
    "c4_windows": "c4",
    "c4_windows_sample": "c4",
    "humaneval_moequant": "humaneval",
    "mmlu_moequant": "mmlu",
    "wikitext2": "wikitext",
}
