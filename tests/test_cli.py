"""What the command line makes of an error of the parser."""

import pytest

from moeq.cli import first_mistake

UNION = "Does not validate against any of the Union subtypes\nSubtypes: [<class 'A'>, <class 'NoneType'>]\nErrors:\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bits (9) must be between 2 and 8", "bits (9) must be between 2 and 8"),
        (
            UNION + "  - length (0) must be positive;\n    take 8\n  - Expected a <class 'NoneType'>\nGiven value: x",
            "length (0) must be positive; take 8",
        ),
        (
            f"Parser key \"data\":\n  {UNION}  - Problem with given class_path 'my.Data':\n"
            f"      Parser key \"sampling\":\n  {UNION}    - Problem with given class_path 'my.Data':\n"
            "        Option 'num_sample' is not accepted\n    - Expected a <class 'NoneType'>\n",
            "data.sampling: Option 'num_sample' is not accepted; --data.help my.Data lists its options",
        ),
        (
            f'Parser key "data":\n  {UNION}  - Parser key "length":\n  {UNION}    - Expected a <class \'int\'>\n',
            "data.length: Expected a <class 'int'>",
        ),
    ],
)
def test_an_error_of_types_within_types_becomes_what_was_meant(text: str, expected: str) -> None:
    assert first_mistake(ValueError(text)) == expected
