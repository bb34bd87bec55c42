"""The ingest outputs of this run have the hashes of the committed dvc.lock.

Training is left out: its sums depend on the processor, so another machine may give other bytes.
"""

import subprocess
import sys
from pathlib import Path

ORDER = ("fetch", "load", "validate", "featurize")


def outputs(text: str) -> dict[str, list[str]]:
    """Hashes of the outs of each stage, in order; dvc.lock is plain enough to read by line."""
    found: dict[str, list[str]] = {}
    stage, part = "", ""
    for line in text.splitlines():
        indent, word = len(line) - len(line.lstrip()), line.strip()
        if indent == 2 and word.endswith(":"):
            stage, part = word[:-1], ""
        elif indent == 4 and word.endswith(":"):
            part = word[:-1]
        elif part == "outs" and word.startswith("md5:"):
            found.setdefault(stage, []).append(word)
    return found


def main() -> int:
    committed = subprocess.run(
        ["git", "show", "HEAD:dvc.lock"], capture_output=True, text=True, check=True
    ).stdout
    here = outputs(Path("dvc.lock").read_text(encoding="utf-8"))
    there = outputs(committed)
    wrong = [name for name in ORDER if here.get(name) != there.get(name) or not here.get(name)]
    print(f"same lock: {', '.join(wrong) + ' differ' if wrong else 'the ingest stages agree'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
