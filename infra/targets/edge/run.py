"""A device's own answers: a signed bundle, scored and kept new, with or without a network.

    python current/run.py score < ROWS     a JSON record on each line in, a probability out
    python current/run.py update SOURCE    SOURCE: the folder or URL of the channel

The folder above holds signing.pub (whom to believe), device (its name), current (a link into
releases/) and answered.jsonl, begun anew at 100 MB. Nothing is opened but what the signed channel
names by its hash. An update is whole or absent, takes what it lacks, and never an older channel.
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
from contextlib import suppress
from pathlib import Path

# Ed25519 as in RFC 8032, section 5.1: points (x, y) of a curve over the integers modulo P.
P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
LARGEST = 2**128 - 2**104  # of the numbers that a float32 holds; NaN is not below it


def add(p, q):
    (x, y), (u, v) = p, q
    t = D * x * y * u * v
    return (x * v + u * y) * pow(1 + t, -1, P) % P, (y * v + x * u) * pow(1 - t, -1, P) % P


def times(number, p):
    rest = times(number // 2, add(p, p)) if number else (0, 1)
    return add(rest, p) if number % 2 else rest


def point(encoded):
    """The point of 32 bytes: y, and the sign of x in the highest bit."""
    sign, y = divmod(int.from_bytes(encoded, "little"), 2**255)
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    x = x if (x * x - square) % P == 0 else x * pow(2, (P - 1) // 4, P) % P
    return x if x & 1 == sign else P - x, y


def verifies(key, message, signature):
    """Whether the 64 bytes are the key's signature on the message."""
    base = point((4 * pow(5, -1, P) % P).to_bytes(32, "little"))
    number = int.from_bytes(signature[32:64], "little")
    hashed = int.from_bytes(hashlib.sha512(signature[:32] + key + message).digest(), "little")
    x, y = add(times(number, base), times(-hashed % ORDER, point(key)))
    same = (y | (x & 1) << 255).to_bytes(32, "little") == signature[:32]
    return same and len(signature) == 64 and number < ORDER


def believed(content, root):
    """The channel of these bytes, if the key of this device signed it, and this device's slot."""
    try:
        key = base64.b64decode((root / "signing.pub").read_bytes().split(b"-----")[2])[-32:]
        channel = json.loads(content)
        signature = base64.b64decode(channel.pop("signature"), validate=True)
        text = json.dumps(channel, sort_keys=True, separators=(",", ":")).encode()
        slots = channel["slots"]  # which other things that the key signs have not
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        raise ValueError("the channel is no signed JSON, or signing.pub no key") from None
    if not verifies(key, text, signature):
        raise ValueError("the channel's signature is not of signing.pub")
    return channel, slots[slot_of(channel, (root / "device").read_text().strip())]


def slot_of(channel, device):
    """Which slot this device takes: the same for the same share, whoever else is there."""
    drawn = int(hashlib.sha256(f"{channel['model']}/{device}".encode()).hexdigest(), 16) % 100
    return "challenger" if drawn < channel["percent"] else "champion"


def read(path, sha256):
    """The bytes of a file if they are those of the hash, else None."""
    content = path.read_bytes() if path.is_file() else b""
    return content if hashlib.sha256(content).hexdigest() == sha256 else None


def fetch(source, name):
    base = source if "://" in source else Path(source).absolute().as_uri()
    with urllib.request.urlopen(f"{base}/{name}", timeout=30) as content:
        return content.read(1 << 28)


def locked(file):
    lock = file.open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
    return lock


def update(root, source):
    """Take what the channel has for this device. Returns how many bytes travelled."""
    content, current, releases = fetch(source, "channel.json"), root / "current", root / "releases"
    (channel, slot), travelled = believed(content, root), 0
    if current.is_symlink():
        model, counter = channel["model"], int(current.readlink().name.partition("-")[0])
        with suppress(ValueError, OSError):  # damaged: the folder's name still has the counter
            model = believed((current / "channel.json").read_bytes(), root)[0]["model"]
        if model != channel["model"] or counter > channel["counter"]:
            raise ValueError(f"the channel is older than the {counter} held, or another's")
    files = slot["files"] | {"channel.json": hashlib.sha256(content).hexdigest()}
    lost = {file for file, sha256 in files.items() if read(current / file, sha256) is None}
    new = releases / f"{channel['counter']:08}-{time.time_ns()}"
    try:
        if not lost:
            return 0
        new.mkdir(parents=True)
        for file, sha256 in slot["files"].items():  # what is no plain name is missed by `answer`
            fresh = fetch(source, f"files/{sha256}") if file in lost else b""
            (new / Path(file).name).write_bytes(fresh or (current / file).read_bytes())
            travelled += len(fresh)
        (new / "channel.json").write_bytes(content)
        answer(new, slot)  # what is not as signed, or cannot answer, is not taken
        os.sync()
        (new / ".link").symlink_to(new.relative_to(root))
        (new / ".link").replace(current)
    finally:
        with locked(root / ".lock"):  # so nobody is answering from what goes now
            for other in set(releases.iterdir()) - {releases / current.resolve().name}:
                shutil.rmtree(other, ignore_errors=True)
    return travelled


def answer(release, slot, rows=None):
    """The probability of each record, or of one of missing values; None where there is none."""
    import numpy as np
    import onnxruntime

    for file, sha256 in slot["files"].items():
        if read(release / file, sha256) is None:
            raise ValueError(f"{file} is not as it was signed")
    contract = json.loads((release / "bundle.json").read_text())
    columns = {column["name"]: column["type"] for column in contract["columns"]}
    rows, feed = [dict.fromkeys(columns)] if rows is None else rows, {}
    for number, row in enumerate(rows, start=1):
        if wrong := set(row if isinstance(row, dict) else ()) ^ set(columns):
            raise ValueError(f"row {number}, column {min(wrong)}: missing, or not of the contract")
    for name, kind in columns.items():
        text = kind == "string"
        blank, wanted, dtype = ("", [str], object) if text else (np.nan, [int, float], np.float32)
        values = [row[name] for row in rows]
        for number, value in enumerate(values, start=1):
            if not (value is None or (type(value) in wanted and (text or abs(value) <= LARGEST))):
                raise ValueError(f"row {number}, column {name}: expected {kind} or null")
        feed[name] = np.array([blank if value is None else value for value in values], dtype)
    session = onnxruntime.InferenceSession(release / "model.onnx")
    return [float(p) if 0 <= p <= 1 else None for p in session.run(None, feed)[0]]


def score(root, lines):
    """Answer, and note it in answered.jsonl for whoever asks the device."""
    begun, rows = time.perf_counter(), []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line.decode()))
            json.dumps(rows[-1], ensure_ascii=False).encode()  # half a surrogate is no text
        except (ValueError, RecursionError) as error:
            raise ValueError(f"row {number} is no JSON: {error}") from None
    if not rows:
        raise ValueError("no rows; expected a JSON record on each line")
    with locked(root / ".lock"):
        release = (root / "current").resolve()  # an update may change the link meanwhile
        slot = believed((release / "channel.json").read_bytes(), root)[1]
        found = answer(release, slot, rows)
        note = {"bundle": slot["bundle"], "seconds": time.perf_counter() - begun}
        note["memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        log = root / "answered.jsonl"  # a line of it that is cut by a full disk stays alone
        with log.open("a" if not log.exists() or log.stat().st_size < 10**8 else "w") as file:
            file.write("\n" + json.dumps(note | {"predictions": found}))
    if None in found:
        raise ValueError("the model gave no probability")
    return found


def main(verb="", *source):
    root = Path(__file__).absolute().parent.parent  # of current/, which is a link
    if (verb, len(source)) == ("update", 1):
        with locked(root / ".update"):
            print(f"{update(root, *source):,} bytes travelled")
    elif (verb, len(source)) == ("score", 0):
        print(*score(root, sys.stdin.buffer.readlines()), sep="\n")
    else:
        raise ValueError("expected: score < ROWS, or update SOURCE")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:  # whatever it is: nobody reads a traceback on a device
        print("run.py: error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
