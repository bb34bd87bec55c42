"""A device's own answers: a signed bundle, scored and kept new, with or without a network.

    python current/run.py score < ROWS     a JSON record on each line in, a probability out
    python current/run.py update SOURCE    SOURCE: the folder or URL of the channel

The folder above holds signing.pub (whom to believe), device (its name), current (a link into
releases/) and answered.jsonl. Nothing is opened but what the signed channel names by its hash. An
update is whole or absent, moves only files that changed, and never goes back to an older channel.
"""

import base64
import fcntl
import hashlib
import json
import os
import resource
import shutil
import sys
import time
import urllib.request
from pathlib import Path

# Ed25519 as in RFC 8032, section 5.1, on points in extended coordinates (X, Y, Z, T).
P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P


class UserError(Exception):
    """One line: what was not as expected. Nothing was changed."""


def add(p, q):
    a, b = (p[1] - p[0]) * (q[1] - q[0]) % P, (p[1] + p[0]) * (q[1] + q[0]) % P
    c, d = 2 * p[3] * q[3] * D % P, 2 * p[2] * q[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def times(number, p):
    total = (0, 1, 1, 0)
    for bit in f"{number:b}":
        total = add(add(total, total), p) if bit == "1" else add(total, total)
    return total


def point(encoded):
    """The point of 32 bytes: y, and the sign of x in the highest bit."""
    y, sign = int.from_bytes(encoded, "little") & (2**255 - 1), encoded[31] >> 7
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    x = x if (x * x - square) % P == 0 else x * pow(2, (P - 1) // 4, P) % P
    if y >= P or (x * x - square) % P or (x == 0 and sign):
        raise UserError("the key is no point of the curve")
    x = P - x if x & 1 != sign else x
    return x, y, 1, x * y % P


BASE = point((4 * pow(5, -1, P) % P).to_bytes(32, "little"))


def verifies(key, message, signature):
    """Whether the 64 bytes are the key's signature on the message."""
    number = int.from_bytes(signature[32:], "little")
    x, y, z, t = point(key)
    hashed = hashlib.sha512(signature[:32] + key + message).digest()
    challenge = int.from_bytes(hashed, "little") % ORDER
    x, y, z, _ = add(times(number, BASE), times(challenge, (P - x, y, z, P - t)))
    x, y = x * pow(z, -1, P) % P, y * pow(z, -1, P) % P
    same = (y | (x & 1) << 255).to_bytes(32, "little") == signature[:32]
    return same and len(signature) == 64 and number < ORDER


def believed(content, root):
    """The channel of these bytes, if the key of this device signed it."""
    key = base64.b64decode((root / "signing.pub").read_bytes().split(b"-----")[2])[-32:]
    try:
        channel = json.loads(content)
        signature = base64.b64decode(channel.pop("signature"), validate=True)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError("the channel is no signed JSON") from None
    text = json.dumps(channel, sort_keys=True, separators=(",", ":")).encode()
    if not verifies(key, text, signature):
        raise UserError("the channel's signature is not of signing.pub")
    return channel


def slot_of(channel, device):
    """Which slot this device takes: the same for the same share, whoever else is there."""
    drawn = int(hashlib.sha256(f"{channel['model']}/{device}".encode()).hexdigest(), 16) % 100
    return "challenger" if drawn < channel["percent"] else "champion"


def signed(release, root):
    """The channel that a release came with, and the slot it is of."""
    channel = believed((release / "channel.json").read_bytes(), root)
    return channel, channel["slots"][(release / "slot").read_text()]


def read(path, sha256):
    """The bytes of a file if they are those of the hash, else None."""
    content = path.read_bytes() if path.is_file() else b""
    return content if hashlib.sha256(content).hexdigest() == sha256 else None


def fetch(source, name):
    base = source if "://" in source else Path(source).absolute().as_uri()
    with urllib.request.urlopen(f"{base}/{name}", timeout=30) as content:
        return content.read(1 << 28)


def update(root, source):
    """Take what the channel has for this device. Returns how many bytes travelled."""
    content, current = fetch(source, "channel.json"), root / "current"
    channel = believed(content, root)
    if current.exists():
        before, _ = signed(current, root)
        if before["model"] != channel["model"] or before["counter"] > channel["counter"]:
            raise UserError(f"the channel is older than the {before['counter']} held, or another's")
    name = slot_of(channel, (root / "device").read_text().strip())
    final = root / "releases" / f"{channel['counter']:08}-{name}"
    if current.exists() and current.resolve().name == final.name:
        return 0
    partial, travelled = root / "releases" / ".partial", 0
    partial.unlink() if partial.is_symlink() else shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file, sha256 in channel["slots"][name]["files"].items():
        kept = read(current / file, sha256)
        fresh = b"" if kept is not None else fetch(source, f"files/{sha256}")
        (partial / file).write_bytes(kept or fresh)
        travelled += len(fresh)
    (partial / "channel.json").write_bytes(content)
    (partial / "slot").write_text(name)
    answer(partial, root)  # what is not as signed, or cannot answer, is not taken
    os.sync()
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    partial.symlink_to(final.relative_to(root))
    partial.replace(current)
    for old in set(final.parent.iterdir()) - {final}:
        shutil.rmtree(old)
    return travelled


def answer(release, root, rows=None):
    """The bundle that answers and the probability of each record, or of one of missing values."""
    import numpy as np
    import onnxruntime

    slot = signed(release, root)[1]
    for file, sha256 in slot["files"].items():
        if read(release / file, sha256) is None:
            raise UserError(f"{file} is not as it was signed")
    contract = json.loads((release / "bundle.json").read_text())
    columns = {column["name"]: column["type"] for column in contract["columns"]}
    rows, feed = [dict.fromkeys(columns)] if rows is None else rows, {}
    for number, row in enumerate(rows, start=1):
        if wrong := set(row if isinstance(row, dict) else ()) ^ set(columns):
            raise UserError(f"row {number}: column {min(wrong)} is missing, or not of the contract")
    for name, kind in columns.items():
        text = kind == "string"
        blank, wanted, dtype = ("", str, object) if text else (np.nan, float, np.float32)
        values = [blank if row[name] is None else row[name] for row in rows]
        for number, value in enumerate(values, start=1):
            if not (isinstance(value, wanted) or (wanted is float and type(value) is int)):
                raise UserError(f"row {number}: {name} is {value!r}; expected {kind}")
        feed[name] = np.array(values, dtype)
    session = onnxruntime.InferenceSession(release / "model.onnx")
    return slot["bundle"], [float(value) for value in session.run(None, feed)[0]]


def score(root, lines):
    """Answer, and note it in answered.jsonl for whoever asks the device."""
    begun = time.perf_counter()
    bundle, found = answer(root / "current", root, [json.loads(line) for line in lines])
    note = {"bundle": bundle, "seconds": time.perf_counter() - begun, "predictions": found}
    note["memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with (root / "answered.jsonl").open("a") as file:
        file.write(json.dumps(note) + "\n")
    return found


def main(verb="", *source):
    root = Path(__file__).absolute().parent.parent  # of current/, which is a link
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (verb, len(source)) == ("update", 1):
            print(f"{update(root, *source):,} bytes travelled")
        elif (verb, len(source)) == ("score", 0):
            print(*score(root, sys.stdin), sep="\n")
        else:
            raise UserError("expected: score < ROWS, or update SOURCE")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (UserError, OSError, ValueError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        sys.exit(2)
