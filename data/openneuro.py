"""OpenNeuro: list a snapshot and choose the T1w and T2w that are needed of it.

Owns the archive's protocol: GraphQL listing, names, addresses of a file. Which scans belong
together is decided by `data/bids.py`.

How the archive answers was read in its server's source (github.com/OpenNeuroOrg/openneuro:
`datalad/files.ts`, `handlers/datalad.ts`, `docs/api.md`) and in its users' reports, numbered where
they decided something: OpenNeuroOrg/openneuro#N.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from tqdm import tqdm

from data import bids
from data.transfer import (ArchiveError, Busy, File, Line, Overloaded, Patience, Refused, Retry,
                           StayAway, Unreachable, bare, is_passing, retry_after, steady, why)

API_URL = "https://openneuro.org/crn/graphql"
S3_URL = "https://s3.amazonaws.com/openneuro.org"
API_VARIABLE, S3_VARIABLE = "OPENNEURO_API_URL", "OPENNEURO_S3_URL"
# Pinned, so that the same command gives the same data next year.
DEFAULT_TAGS = {"ds002330": "1.1.0", "ds002382": "1.0.1", "ds003717": "1.0.1",
                "ds003745": "1.0.0", "ds004285": "1.0.0"}

_SPEC = re.compile(r"(ds\d{6})(?::([A-Za-z0-9][A-Za-z0-9._-]*))?")
_FIELDS = "{ id filename size urls directory }"
_TREES_A_QUERY = 20  # each costs the server a look into git
# Folders in which T1w, T2w and their sidecars can be; also what bounds the walk.
_FOLDER = re.compile(r"sub-([^/]+)(?:/ses-([^/]+))?(?:/anat)?")
_ANAT = re.compile(r"sub-([^/]+)/(?:ses-([^/]+)/)?anat/([^/]+)")
_COMMON = re.compile(r"dataset_description\.json|participants\.tsv|(README|CHANGES)(\.\w+)?")
_FINAL_CODES = {"GRAPHQL_VALIDATION_FAILED", "GRAPHQL_PARSE_FAILED", "BAD_USER_INPUT", "FORBIDDEN",
                "UNAUTHENTICATED"}
_FINAL_MESSAGE = re.compile("not found|do(es)? not (exist|have access)|cannot query|unknown arg"
                            "|not authorized|deleted", re.IGNORECASE)

log = logging.getLogger("preprocess.openneuro")  # the command that shows what this module says


# -------------------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Snapshot:
    """A tagged version of a dataset and the files that could be needed.

    `closed` are folders of subjects that the archive names without the id that opens them.
    """

    dataset: str
    tag: str
    files: tuple[File, ...]
    closed: tuple[str, ...] = ()


@dataclass(frozen=True)
class SubjectFiles:
    """What a subject needs: T1w and T2w of each session that has both, and their sidecars."""

    subject: str
    scans: tuple[tuple[str, str, str], ...]  # session ("" for none), T1w name, T2w name
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes, by the API."""
        return sum(file.size or 0 for file in self.files)

    def sessions(self, root: Path) -> list[bids.Subject]:
        """As `bids.find_subjects` will find them in the dataset's folder `root`."""
        return [bids.Subject(root.name, self.subject, session, root, root / t1w, root / t2w)
                for session, t1w, t2w in self.scans]

    def only(self, sessions: Collection[str], *, shared: bool = True) -> SubjectFiles:
        """The same subject with some of its sessions; not `shared`: without their common files."""
        def folders(names: Collection[str]) -> tuple[str, ...]:
            return tuple(f"sub-{self.subject}/" + (f"ses-{name}/" if name else "anat/")
                         for name in names)

        ours, others = folders(sessions), folders({scan[0] for scan in self.scans} - set(sessions))
        return SubjectFiles(
            self.subject, tuple(scan for scan in self.scans if scan[0] in sessions),
            tuple(file for file in self.files if file.name.startswith(ours)
                  or shared and not file.name.startswith(others)))


@dataclass(frozen=True)
class Plan:
    """What to download, before anything is.

    Attributes
    ----------
    snapshot : Snapshot
    subjects : in the order of `bids.find_subjects`
    common : files that belong to no subject
    missing : id of a session to the reason why it cannot be used
    """

    snapshot: Snapshot
    subjects: tuple[SubjectFiles, ...]
    common: tuple[File, ...]
    missing: dict[str, str]

    @property
    def files(self) -> list[File]:
        """All files, common ones first."""
        return [*self.common, *(file for subject in self.subjects for file in subject.files)]

    @property
    def total_bytes(self) -> int:
        """Sum of the sizes that the API gives."""
        return sum(file.size or 0 for file in self.files)

    def peak_bytes(self, ahead: int) -> int:
        """The most that `ahead` subjects take on disk, by the API's sizes."""
        return sum(sorted((subject.size for subject in self.subjects), reverse=True)[:ahead])

    def __str__(self) -> str:
        unknown = sum(file.size is None for file in self.files)
        return (f"{self.snapshot.dataset} {self.snapshot.tag}: {_count(self.subjects, 'subject')}, "
                f"{_count(self.files, 'file')}, {size_text(self.total_bytes)}"
                + (f" and {unknown} of unknown size" if unknown else ""))


def _count(things: tuple | list, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def size_text(n: float) -> str:
    """Bytes for people: 1.23GB."""
    return tqdm.format_sizeof(n, "B")


def parse_spec(spec: str) -> tuple[str, str | None]:
    """Split `ds002330[:1.1.0]` into dataset and tag; the tag is None where there is none.

    Raises
    ------
    ValueError : not an accession number
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise ValueError(f"'{spec}': not an OpenNeuro accession number; write ds002330 or "
                         "ds002330:1.1.0")
    return match.group(1), match.group(2)


def check_name(name: str) -> None:
    """Refuse a name that could lead out of the dataset's folder.

    Raises
    ------
    ValueError : an absolute path, an empty, `.` or `..` part, a backslash, a colon (a drive, and
        the archive's own stand-in for `/`), a control character, or a part too long for a disk
    """
    parts = name.split("/")
    if (re.search(r"[\x00-\x1f\x7f\\:]", name) or {"", ".", ".."} & set(parts)
            or any(len(part.encode(errors="replace")) > 240 for part in parts)):
        raise ValueError(f"{name!r}: not a safe file name below a dataset's folder")


def place(root: Path, name: str) -> Path:
    """Where a file of a snapshot belongs.

    Raises
    ------
    ValueError : an unsafe name, or one of its folders (or itself) is a symbolic link
    """
    check_name(name)
    path = root
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise ValueError(f"{path}: a symbolic link, which is not followed; remove it or choose "
                             "another --downloads")
    return path


# ---------------------------------------------------------------------------------------- the plan


def make_plan(snapshot: Snapshot, limit: int | None = None) -> Plan:
    """Choose the files that are needed.

    Per session the scans that `bids.choose` takes, of sessions with a T1w and a T2w; their JSON
    sidecars with those that they inherit from folders above; description, participants, README and
    CHANGES of the dataset.

    Parameters
    ----------
    snapshot : Snapshot
    limit : take the first so many subjects; all if None

    Raises
    ------
    ValueError : no subject has both
    """
    pairs, missing = _pair(snapshot)
    by_folder: dict[str, list[File]] = {}
    for file in snapshot.files:
        by_folder.setdefault(file.name.rpartition("/")[0], []).append(file)
    common = {file.name: file for file in by_folder.get("", ()) if _COMMON.fullmatch(file.name)}
    people: dict[str, list[tuple[str, File, File]]] = {}
    for key in sorted(pairs, key=lambda key: bids.subject_id("", *key)):
        people.setdefault(key[0], []).append((key[1], *pairs[key]))
    subjects = []
    for subject, sessions in list(people.items())[:limit]:
        files = {scan.name: scan for _, *scans in sessions for scan in scans}
        for sidecar in [s for name in files for s in _sidecars(name, by_folder)]:
            (files if "/" in sidecar.name else common)[sidecar.name] = sidecar
        scans = tuple((session, t1w.name, t2w.name) for session, t1w, t2w in sessions)
        subjects.append(SubjectFiles(subject, scans, tuple(files.values())))
    if not subjects:
        first = next((f" ({i}: {reason})" for i, reason in missing.items()), "")
        raise ValueError(f"{snapshot.dataset} {snapshot.tag}: no subject has a T1w and a "
                         f"T2w{first}")
    if limit is not None:
        taken = {bids.subject_id(snapshot.dataset, s.subject, "") for s in subjects}
        missing = {i: why for i, why in missing.items() if i.partition("_ses-")[0] in taken}
    return Plan(snapshot, tuple(subjects), tuple(common[name] for name in sorted(common)), missing)


def _pair(snapshot: Snapshot) -> tuple[dict[tuple[str, str], tuple[File, File]], dict[str, str]]:
    """(subject, session) to T1w and T2w; id to reason where one of them is missing."""
    sessions: dict[tuple[str, str], dict[str, File]] = {}
    for file in snapshot.files:
        if match := _ANAT.fullmatch(file.name):
            key = match.group(1), match.group(2) or ""
            sessions.setdefault(key, {})[match.group(3)] = file
    pairs, missing = {}, {}
    for key, files in sorted(sessions.items()):
        where = next(iter(files.values())).name.rpartition("/")[0]
        # bids takes files on a disk; nothing below the null device can be a folder.
        t1w, t2w, reason = bids.pair_scans([Path(os.devnull, name) for name in sorted(files)],
                                           where, *key)
        if t1w and t2w:
            pairs[key] = files[t1w.name], files[t2w.name]
        elif reason:
            missing[bids.subject_id(snapshot.dataset, *key)] = reason
    for folder in snapshot.closed:
        if (match := _FOLDER.fullmatch(folder)) and (match[1], match[2] or "") not in pairs:
            missing[bids.subject_id(snapshot.dataset, match[1], match[2] or "")] = (
                f"{folder}: the archive lists this folder without an id, so not what is in it; "
                "try again later")
    return pairs, missing


def _sidecars(scan: str, by_folder: dict[str, list[File]]) -> Iterator[File]:
    """The JSON files that describe a scan, by the inheritance principle of BIDS."""
    *entities, suffix = PurePosixPath(scan).name.partition(".")[0].split("_")
    for folder in PurePosixPath(scan).parents:
        for file in by_folder.get("" if str(folder) == "." else str(folder), ()):
            stem, _, ending = PurePosixPath(file.name).name.partition(".")
            *theirs, kind = stem.split("_")
            if ending == "json" and kind == suffix and set(theirs) <= set(entities):
                yield file


# ------------------------------------------------------------------------------------- the archive


class Archive:
    """OpenNeuro or a mirror of it; holds the connections, so use it in a `with`.

    Parameters
    ----------
    api_url : the GraphQL endpoint; `OPENNEURO_API_URL` or OpenNeuro's own if None. Where it is
        https, nothing is ever fetched by plain http.
    s3_url : public address of the files, to which `/DATASET/PATH` is added; `OPENNEURO_S3_URL`, or
        OpenNeuro's own if that is the API's, else none
    patience : Patience

    Attributes
    ----------
    line : Line, for downloads

    Raises
    ------
    ValueError : an address that is not one
    """

    def __init__(self, api_url: str | None = None, s3_url: str | None = None,
                 patience: Patience = Patience()):
        self.api_url = _endpoint(api_url or os.environ.get(API_VARIABLE) or API_URL)
        own = S3_URL if self.api_url == API_URL else ""
        self.s3_url = (s3_url or os.environ.get(S3_VARIABLE) or own).rstrip("/")
        timeout = httpx.Timeout(patience.silence_s, connect=patience.connect_s, pool=None)
        # Identity: compressed on the way, a body has another length, hash and ranges than the file.
        headers = {"User-Agent": "t1w-t2w-cyclegan (httpx)", "Accept-Encoding": "identity"}
        try:
            client = httpx.Client(timeout=timeout, headers=headers, follow_redirects=False,
                                  limits=httpx.Limits(max_keepalive_connections=32))
        except (httpx.InvalidURL, ValueError, OSError) as error:
            raise ValueError(f"the environment lets no connection be made ({error}); look at "
                             "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and "
                             "SSL_CERT_DIR") from None
        self.line = Line(client, patience, self.api_url.startswith("https:"), threading.Event())

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self.line.stop.set()
        self.line.client.close()

    def snapshot(self, spec: str) -> Snapshot:
        """List a snapshot.

        Parameters
        ----------
        spec : `ds002330` (the pinned tag, or the latest where none is pinned) or `ds002330:1.1.0`

        Raises
        ------
        ValueError : no such dataset or tag (says which there are)
        ArchiveError : the API cannot be reached or lists nothing
        """
        dataset, tag = parse_spec(spec)
        tag = tag or DEFAULT_TAGS.get(dataset) or self._latest(dataset)
        try:
            files, closed = self._list(dataset, tag)
        except ArchiveError as error:
            if not isinstance(error, StayAway) and not isinstance(error.__cause__,
                                                                  (Unreachable, Busy)):
                self._check_tag(dataset, tag)
            raise
        if not files:
            raise ArchiveError(f"{dataset} {tag}: the archive lists no files; try again later")
        return Snapshot(dataset, tag, files, closed)

    def tags(self, dataset: str) -> list[str]:
        """The tags of a dataset's snapshots, in the archive's order.

        Raises
        ------
        ValueError : no such dataset
        """
        query = "query($dataset: ID!) { dataset(id: $dataset) { snapshots { tag } } }"
        found = self._dataset(query, dataset).get("snapshots")
        return [str(snapshot.get("tag")) for snapshot in (found if isinstance(found, list) else ())
                if isinstance(snapshot, dict)]

    def addresses(self, snapshot: Snapshot, file: File) -> list[tuple[str, bool]]:
        """Where to look for a file, in this order, and whether that is surely this version.

        The API's own addresses (storage with a version, or its objects); storage's present version,
        which is there when a version's link or permission is broken (#2521, #2677); the API's file
        route, which has `:` in place of `/`.
        """
        name = f"/{snapshot.dataset}/{quote(file.name)}"
        route = (f"{self.api_url.rpartition('/')[0]}/datasets/{snapshot.dataset}/snapshots/"
                 f"{snapshot.tag}/files/{quote(file.name.replace('/', ':'), safe=':')}")
        storage = [(self.s3_url + name, False)] if self.s3_url else []
        return [*((url, True) for url in file.urls), *storage, (route, True)]

    def _latest(self, dataset: str) -> str:
        query = "query($dataset: ID!) { dataset(id: $dataset) { latestSnapshot { tag } } }"
        latest = self._dataset(query, dataset).get("latestSnapshot")
        tag = latest.get("tag") if isinstance(latest, dict) else None
        if not tag:
            raise ValueError(f"{dataset}: has no snapshot")
        log.info("%s: no tag given, taking the latest, %s", dataset, tag)
        return parse_spec(f"{dataset}:{tag}")[1] or ""

    def _check_tag(self, dataset: str, tag: str) -> None:
        tags = self.tags(dataset)
        if tag not in tags:
            raise ValueError(f"{dataset}: has no snapshot '{tag}'; there are "
                             f"{', '.join(tags) or 'none'}") from None

    def _dataset(self, query: str, dataset: str) -> dict[str, Any]:
        try:
            found = self._ask(query, {"dataset": dataset},
                              lambda data: bool(data.get("dataset"))).get("dataset")
        except ArchiveError as error:
            if _FINAL_MESSAGE.search(str(error)):
                raise ValueError(f"{dataset}: {error}") from None
            raise
        if not found or not isinstance(found, dict):
            raise ValueError(f"{dataset}: no such dataset at {self.api_url}")
        return found

    # -- listing

    def _list(self, dataset: str, tag: str) -> tuple[tuple[File, ...], tuple[str, ...]]:
        """All files that could be needed, in one request where the server can do that.

        Also the folders without an id, of which nothing is listed.
        """
        try:
            entries = self._ask_files(dataset, tag, ["files(recursive: true)"])[0]
        except ArchiveError as error:
            if isinstance(error, StayAway) or isinstance(error.__cause__, Unreachable):
                raise
            log.info("%s: no listing at once (%s), going through its folders", dataset, error)
            entries = self._ask_files(dataset, tag, ["files"])[0]
        files, folders = _sort_entries(entries, "")
        # A server may list folders as such, beside their files or in place of them.
        listed = {name.rpartition("/")[0] + "/" for name in files}
        folders = {name: tree for name, tree in folders.items()
                   if not any(folder.startswith(name + "/") for folder in listed)}
        closed = [name for name, tree in folders.items() if not tree]
        while folders := {name: tree for name, tree in folders.items() if tree}:
            batch = dict(list(folders.items())[:_TREES_A_QUERY])
            trees = {f"t{i}": tree for i, tree in enumerate(batch.values())}
            found = self._ask_files(dataset, tag, [f"files(tree: ${t})" for t in trees], trees)
            for name, entries in zip(batch, found):
                del folders[name]
                more_files, more_folders = _sort_entries(entries, name + "/")
                files.update(more_files)
                folders.update(more_folders)
                closed += [folder for folder, tree in more_folders.items() if not tree]
        return tuple(files[name] for name in sorted(files)), tuple(sorted(closed))

    def _ask_files(self, dataset: str, tag: str, fields: list[str],
                   trees: dict[str, str] | None = None) -> list[list[Any]]:
        """The entries of several folders by one query."""
        trees = trees or {}
        declared = "".join(f", ${name}: String" for name in trees)
        wanted = " ".join(f"a{i}: {text} {_FIELDS}" for i, text in enumerate(fields))
        query = (f"query($dataset: ID!, $tag: String!{declared}) "
                 f"{{ snapshot(datasetId: $dataset, tag: $tag) {{ {wanted} }} }}")

        def listings(data: dict[str, Any]) -> list[list[Any]]:
            found = data.get("snapshot")
            lists = [found.get(f"a{i}") if isinstance(found, dict) else None
                     for i in range(len(fields))]
            return [entries for entries in lists if isinstance(entries, list)]

        def complete(data: dict[str, Any]) -> bool:  # a null in a list is a file that is not listed
            found = listings(data)
            return len(found) == len(fields) and not any(None in entries for entries in found)

        data = self._ask(query, {"dataset": dataset, "tag": tag, **trees}, complete)
        if len(listings(data)) < len(fields):
            raise ArchiveError(f"{dataset} {tag}: the archive has no listing of it")
        return listings(data)

    def _ask(self, query: str, variables: dict[str, str],
             complete: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The `data` of a query's answer; errors beside complete data are let pass."""
        timeout = httpx.Timeout(self.line.patience.listing_s,
                                connect=self.line.patience.connect_s)

        where = bare(self.api_url)

        def ask() -> dict[str, Any]:
            with self.line.client.stream(
                    "POST", self.api_url, json={"query": query, "variables": variables},
                    timeout=timeout) as response:
                try:
                    body = b"".join(steady(response.iter_bytes(), self.line.patience.listing_s))
                except Retry as error:  # it drips: as good as silent
                    raise httpx.ReadTimeout(str(error)) from None
                return _read_answer(response, body, complete)

        def attempt() -> dict[str, Any]:
            try:
                return ask()
            except (Retry, httpx.RequestError) as error:
                log.info("%s: %s", where, why(error))  # there may be minutes until the next try
                raise

        try:
            return self.line.persist(attempt)
        except Unreachable as error:
            raise ArchiveError(f"{where}: {error}; check the network and --api-url") from error
        except Refused as error:
            raise ArchiveError(f"{where} answers: {error}") from error


def _endpoint(url: str) -> str:
    """A GraphQL address from what a user may give: with or without `/crn/graphql`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or parts.query or not _is_address(url):
        raise ValueError(f"--api-url {url}: not an address of an API; write "
                         f"{API_URL} or http://localhost:8000/crn/graphql")
    path = parts.path.rstrip("/")
    if not path.endswith("/graphql"):
        path = f"{path or '/crn'}/graphql"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _read_answer(response: httpx.Response, body: bytes,
                 complete: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Tell the API's data from its errors, and those that pass from those that stay."""
    if is_passing(response.status_code):
        raise Overloaded(f"HTTP {response.status_code}", retry_after(response))
    if response.next_request:
        raise Refused(f"HTTP {response.status_code}, look at "
                      f"{bare(str(response.next_request.url))}; give that to --api-url")
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        reason = f"HTTP {response.status_code} without JSON, so not a GraphQL endpoint"
        raise Refused(reason) if response.status_code >= 300 else Retry(reason)
    data: dict[str, Any] = answer["data"] if isinstance(answer.get("data"), dict) else {}
    found = answer.get("errors")
    errors = [e for e in (found if isinstance(found, list) else ()) if isinstance(e, dict)]
    if errors and not complete(data):
        reason = "; ".join(dict.fromkeys(str(e.get("message")) for e in errors))
        codes = {str(e["extensions"].get("code")) for e in errors
                 if isinstance(e.get("extensions"), dict)}
        final = codes & _FINAL_CODES or _FINAL_MESSAGE.search(reason)
        # The others are its workers' timeouts (#3695, #3726), which come in a 200.
        raise Refused(reason) if final or response.status_code >= 400 else Retry(reason)
    if response.status_code != 200:
        raise Refused(f"HTTP {response.status_code}")
    return data


def _sort_entries(entries: Iterable[Any], prefix: str) -> tuple[dict[str, File], dict[str, str]]:
    """Files by name, and the folders worth a look with their ids, of one listing."""
    files: dict[str, File] = {}
    folders: dict[str, str] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            continue
        given_name = entry["filename"]  # of some servers the whole path
        name = given_name if prefix and given_name.startswith(prefix) else prefix + given_name
        key = str(entry.get("id") or "")
        try:
            check_name(name)
        except ValueError as error:
            log.warning("%s; left out", error)
            continue
        if entry.get("directory"):
            if _FOLDER.fullmatch(name):
                folders[name] = key
        elif "/" not in name or _FOLDER.fullmatch(name.rpartition("/")[0]):
            given = entry.get("urls")
            urls = tuple(url for url in (given if isinstance(given, list) else ())
                         if _is_address(url))
            files[name] = File(name, key, _read_size(entry.get("size")), urls)
    return files, folders


def _is_address(url: Any) -> bool:
    with contextlib.suppress(httpx.InvalidURL, ValueError):
        return isinstance(url, str) and bool(httpx.URL(url).host and urlsplit(url).netloc)
    return False


def _read_size(size: Any) -> int | None:
    """A BigInt, which comes as a number or as a string; None for anything else."""
    try:
        return int(size) if not isinstance(size, bool) and int(size) >= 0 else None
    except (TypeError, ValueError, OverflowError):
        return None
