"""Any text file is a task."""

import json
from pathlib import Path

import pytest

from moeq.tasks.domains import domain_task
from moeq.tasks.rows import load_rows


@pytest.mark.parametrize("file", ["mail.txt", "sub/mail.txt.gz", "mail.jsonl", "sub/mail.jsonl.gz"])
def test_a_file_in_any_form_is_a_text_with_its_documents(file: str, tmp_path: Path) -> None:
    import gzip

    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    texts = ["Dear all,\n \nhello.\n"] if ".txt" in file else ["one", "two"]
    content = texts[0] if ".txt" in file else "\n".join(json.dumps({"text": text}) for text in texts)
    path.write_bytes(gzip.compress(content.encode()) if file.endswith(".gz") else content.encode())
    task = domain_task("mail", file, 64, 5)
    rows = load_rows(task.source, tmp_path)
    assert [task.text(row) for row in rows.rows] == texts  # a blank line of a text is no row, and stays as it is
    assert (task.name, task.length, task.documents, rows.split) == ("mail", 64, 5, "mail")


def test_a_file_is_itself_and_no_other_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "mail.txt").write_text("hello\n")
    (tmp_path / "mail.jsonl").write_text('{"text": "other"}\n')
    task = domain_task("mail", "mail.txt", 64, None)
    assert load_rows(task.source, tmp_path).rows == [{"text": "hello\n"}]
    with pytest.raises(ValueError, match=r"no file post\.txt \(also \.gz\) in folder"):
        load_rows(domain_task("post", "post.txt", 64, None).source, tmp_path)


def test_other_kinds_of_file_are_refused() -> None:
    with pytest.raises(ValueError, match=r"domain mail: file mail\.csv must end in"):
        domain_task("mail", "mail.csv", 64, None)
