"""The store: objects of the DVC cache and remote, trusted only once they were read.

DVC believes what its remote lists: an object cut short there stays, push after push, and a folder
whose listing arrived counts as complete (iterative/dvc #10767). So what is given is compared with
its hash first, sent where it is missing or wrong, and compared again.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from pipelines.errors import UserError

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB
    from dvc_data.hashfile.hash_info import HashInfo

THREADS = 8
FOLDER = ".dir"


def objects(outs: Iterable["Output"]) -> list[str]:
    """The ids of all objects of `outs`: files first, a folder's listing after what it lists."""
    ids = {str(hash_info.value) for hash_info in _used(outs)}
    return sorted(ids, key=lambda oid: (oid.endswith(FOLDER), oid))


def _used(outs: Iterable["Output"]) -> set["HashInfo"]:
    return {
        hash_info for out in outs for held in out.get_used_objs().values() for hash_info in held
    }


def give(repo: "Repo", outs: list["Output"]) -> int:
    """Send the outs to the remote and read them back; return how many objects were sent.

    Raises RuntimeError where the remote holds other bytes than the hashes say, even so: then the
    local object is wrong, and is dropped, so that the next attempt makes it again.
    """
    ids = objects(outs)
    cache, remote = repo.cache.local, repo.cloud.get_remote_odb()
    sent = damaged(remote, ids)
    for oid in sent:  # in this order: who finds a listing finds what it lists
        remote.add(cache.oid_to_path(oid), cache.fs, oid, check_exists=False)
    if wrong := damaged(remote, sent):
        for oid in wrong:
            for place in (remote, cache):
                if place.exists(oid):
                    place.delete(oid)
        raise RuntimeError(
            f"{wrong[0]} and {len(wrong) - 1} more arrived damaged at {remote.path}: "
            "the bytes are not those of the hash"
        )
    return len(sent)


def take(repo: "Repo", outs: list["Output"]) -> None:
    """Put the outs into the workspace, from the cache or else from the remote. Every byte is read.

    DVC takes what lies read-only in its cache for right; a torn write there, or a stage that wrote
    into its linked input, would go on under the old name.
    """
    from dvc.exceptions import CollectCacheError

    cache = repo.cache.local
    for out in outs:
        # The listing first: what it names cannot be known from a wrong one.
        drop(cache, [out.hash_info.value])
        try:
            wanted = _used([out])
            ids = [str(hash_info.value) for hash_info in wanted]
            drop(cache, ids)
            repo.cloud.pull(wanted)
        except CollectCacheError:
            ids = [out.hash_info.value]
        # The pull drops what arrives damaged, and may say nothing of it.
        if lost := [oid for oid in ids if not cache.exists(oid)]:
            raise _lost(repo, out, lost)
        out.checkout(force=True)


def _lost(repo: "Repo", out: "Output", ids: list[str]) -> Exception:
    """A remote that lacks an object is a matter for a person; one that did not answer is not."""
    if not (wrong := damaged(repo.cloud.get_remote_odb(), ids)):
        return RuntimeError(f"{out.def_path}: the remote holds {ids[0]} and did not give it")
    return UserError(
        f"{out.def_path} cannot be had: {wrong[0]} is missing or damaged in the remote; "
        f"clear the task {out.stage.name} to make it again"
    )


def drop(cache: "HashFileDB", ids: list[str]) -> list[str]:
    """Remove from the cache what has not the bytes of its hash, and return it."""
    wrong = [oid for oid in damaged(cache, ids) if cache.exists(oid)]
    for oid in wrong:
        cache.delete(oid)
    return wrong


def intact(repo: "Repo", outs: list["Output"]) -> bool:
    """Whether the remote holds every byte of the outs."""
    from dvc.exceptions import CollectCacheError

    if not all(out.hash_info for out in outs):
        return False
    try:
        return not damaged(repo.cloud.get_remote_odb(), objects(outs))
    except CollectCacheError:  # the listing of a folder is nowhere
        return False


def damaged(place: "HashFileDB", ids: list[str]) -> list[str]:
    """Those of the ids that `place` does not hold with the bytes of their hash, in their order."""
    with ThreadPoolExecutor(THREADS) as pool:
        good = pool.map(lambda oid: _holds(place, oid), ids)
    return [oid for oid, held in zip(ids, good, strict=True) if not held]


def _holds(place: "HashFileDB", oid: str) -> bool:
    from dvc_data.hashfile.hash import file_md5

    path, wanted = place.oid_to_path(oid), oid.removesuffix(FOLDER)
    try:
        # S3 gives the MD5 of an object that came in one part; of any other, read the bytes.
        tag = str(place.fs.info(path).get("ETag", "")).strip('"')
        return tag == wanted or file_md5(path, place.fs) == wanted
    except FileNotFoundError:
        return False
