from rec.findings import Finding, render


def test_sound_findings_are_lines_of_one_width() -> None:
    lines = render([Finding("torch", "2.13.0"), Finding("memory of 2 ranks", "1 GiB")]).splitlines()
    assert lines == ["    torch              2.13.0", "    memory of 2 ranks  1 GiB", "", "all is well"]


def test_all_problems_are_there_each_with_its_remedy() -> None:
    two = Finding("data", "3 files", "a is null\nb is text", "clean the log")
    clear = Finding("seed", "-1", "seed is -1, expected 0 or more")
    lines = render([Finding("torch", "2.13.0"), two, clear]).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["torch", "!", "!"]
    assert lines[4:] == [
        "3 problems:",
        "  a is null",
        "  b is text",
        "    remedy: clean the log",
        "  seed is -1, expected 0 or more",
    ]
