"""Chooses the photographs that ship with the package: `python tools/embed_samples.py TEST OUT`.

TEST is the test folder of Caltech-101 (a folder for each class). Of each class, the two files whose
`class/name` has the lowest SHA-256 are copied byte for byte: a choice that nobody's taste made and
that anyone can repeat.
"""

import hashlib
import shutil
import sys
from pathlib import Path

PER_CLASS = 2


def main(source: Path, target: Path) -> None:
    """Copies `PER_CLASS` photographs of each class."""
    count = size = 0
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):

        def digest(path: Path) -> str:
            return hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).hexdigest()

        for path in sorted(folder.glob("*.jpg"), key=digest)[:PER_CLASS]:
            copy = target / folder.name / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            count, size = count + 1, size + path.stat().st_size
    print(f"{count} photographs, {size / 1e6:.1f} MB, in {target}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
