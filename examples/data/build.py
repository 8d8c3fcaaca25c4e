"""Rebuild the demonstration data from the published packages named in README.md.

python build.py MOBY_DICK_DATA_TXT LAMBDA_FA_GZ DH1_FASTA_GZ OUTPUT_FOLDER

Every plain text is checked against its SHA-256 before anything is written. Compression is gzip -9 with no name
and no time, so the same zlib gives the same file.
"""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

SHA256 = {
    "moby_dick.txt": "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240",
    "lambda.fa": "0a04f81952deb68c204e8ae67e0573cb97d348f18ab1b527630d57c294028cf5",
    "ecoli_dh1.fa": "b045431049231780b5aeef730d2346b13c13132719106536c75c8561c9d27750",
}
ECOLI_BASES = 900_000
ECOLI_HEADER = ">NC_017625.1:1-900000 Escherichia coli DH1 chromosome, first 900000 bases"
LINE = 70


def ecoli_start(record: bytes) -> bytes:
    """The first ECOLI_BASES bases of the single FASTA record, under ECOLI_HEADER, in lines of LINE bases."""
    header, *lines = record.decode("ascii").splitlines()
    if "NC_017625.1" not in header:
        raise SystemExit(f"DH1_FASTA_GZ: expected the record NC_017625.1, got {header!r}")
    bases = "".join(lines)[:ECOLI_BASES]
    wrapped = (bases[start : start + LINE] for start in range(0, ECOLI_BASES, LINE))
    return "\n".join([ECOLI_HEADER, *wrapped, ""]).encode("ascii")


def main(moby_dick: str, lambda_fa: str, dh1: str, output: str) -> None:
    plain = {
        "moby_dick.txt": Path(moby_dick).read_bytes(),
        "lambda.fa": gzip.decompress(Path(lambda_fa).read_bytes()),
        "ecoli_dh1.fa": ecoli_start(gzip.decompress(Path(dh1).read_bytes())),
    }
    for name, data in plain.items():
        found = hashlib.sha256(data).hexdigest()
        if found != SHA256[name]:
            raise SystemExit(f"{name}: expected SHA-256 {SHA256[name]}, got {found}")
    for name, data in plain.items():
        Path(output, f"{name}.gz").write_bytes(gzip.compress(data, compresslevel=9, mtime=0))


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
