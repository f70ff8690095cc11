"""MMLU (Hendrycks et al., 2021; MIT): 57 subjects, 5 examples of the same subject from its ``dev`` split.

``mmlu`` is lm-evaluation-harness's, with its groups.  ``mmlu_moequant`` is that of MoEQuant's evaluation code: the
question as it stands, two blanks before the subject, and the letter itself, not a blank and the letter, as the answer.
(That code also drops examples of prompts beyond 2048 tokens, and for sentencepiece tokenizers its letter is one with a
blank.)
"""

from dataclasses import replace

from moeq.tasks.task import DataRow, MultipleChoice, Source

CATEGORIES = {
    "humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions",
    ),
    "other": (
        "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging", "management",
        "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
        "professional_medicine", "virology",
    ),
    "social_sciences": (
        "econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy",
    ),
}  # fmt: skip
HEAD = "The following are multiple choice questions (with answers) about "


def _groups(row: DataRow) -> tuple[str, str]:
    """Category and subject; all other subjects are "stem"."""
    category = next((name for name, subjects in CATEGORIES.items() if row["subject"] in subjects), "stem")
    return category, row["subject"]


def _question(row: DataRow, text: str) -> str:
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return f"{text}\n{options}Answer:"


MMLU = MultipleChoice(
    name="mmlu",
    source=Source("mmlu", hub="cais/mmlu", config="all", splits=("test",), shots="dev"),
    groups=_groups,
    num_shots=5,
    shots_like=lambda row: row["subject"],
    description=lambda row: f"{HEAD}{row['subject'].replace('_', ' ')}.\n\n",
    context=lambda row: _question(row, row["question"].strip()),
    choices=lambda row: list("ABCD"),
    answer=lambda row: int(row["answer"]),
    metrics={"acc": "mean"},
)

MOEQUANT = replace(
    MMLU,
    name="mmlu_moequant",
    description=lambda row: f"{HEAD} {row['subject'].replace('_', ' ')}.\n\n",
    context=lambda row: _question(row, row["question"]),
    delimiter="",
    shot_delimiter=" ",
)

TASKS = (MMLU, MOEQUANT)
