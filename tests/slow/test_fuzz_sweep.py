"""2,000 damaged files for the readers, in separate processes. tests/integration/test_fuzz.py has a few of them."""

import subprocess
import sys
from pathlib import Path

from fuzzing import READERS

ROOT = Path(__file__).parents[2]


def test_two_thousand_damaged_files_give_a_result_or_a_named_error():
    command = [sys.executable, str(ROOT / "tests/fuzzing.py"), "--cases", "2000", "--seed", "20"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout
    # Each reader rejects some files and reads others.
    assert done.stdout.count("refused") == done.stdout.count("result") == len(READERS)
