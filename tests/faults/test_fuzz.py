"""A minute of fuzzing, the same cases each time; `fuzz.py` runs more of them."""

from helpers import fuzz


def test_damaged_files_and_command_lines_are_taken_or_refused():
    counts, findings = fuzz.run(cases=150, seconds=600, seed=0)
    assert not findings
    assert sum(counts.values()) == 150
    refused = {kind for kind, word in counts if word == "refused"}
    assert refused >= {"json", "weights", "image", "command"}
