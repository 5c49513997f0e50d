"""HD-BET 2 (Isensee et al. 2019): its weights, and its predictor loaded once.

Owns what can go wrong with the weights; what a mask is worth is judged in `data/brain.py`.

HD-BET's own download believes any `checkpoint_final.pth`, so a run that was killed while unzipping
leaves a folder that never works again. Here weights are believed only when every file is whole, and
come into HD-BET's folder only after HD-BET has loaded them from a temporary one.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data.brain import describe, machine_fault
from data.nifti import NotNow, Volume

NAME = "brain extraction hd-bet"
CHECKPOINT = "fold_all/checkpoint_final.pth"
FILES = ("dataset.json", "plans.json", CHECKPOINT)  # HD-BET looks for the last: it is moved last
SCRATCH = ".fetch-"  # inside HD-BET's folder: on its file system even where it is a mount or a link
TRIES = 3
PAUSE_S = 3.0
log = logging.getLogger("preprocess.hdbet")


class _Unfit(Exception):
    """Weights, or what should bring them, are of no use; its text is the reason."""


def make_extractor(device: str, *, tta: bool = False) -> Callable[[Volume], np.ndarray]:
    """Load HD-BET 2's own predictor, once for all volumes.

    Parameters
    ----------
    device : "cpu" or "cuda[:K]"
    tta : average over the eight mirrored volumes, too: eight times as long

    Returns
    -------
    A function from a T1w `Volume` to its brain, (I, J, K) bool. It raises ValueError where HD-BET
    fails on one scan (names the file), OSError where the GPU itself has failed.

    Raises
    ------
    ValueError, OSError : as `ensure_weights`; no such device; the weights do not load
    """
    place = _device(device)
    folder = ensure_weights()
    try:
        predictor = _load(folder, place, tta)
    except _Unfit as error:
        raise _misfit(folder, error) from error

    def extract(volume: Volume) -> np.ndarray:
        # nnU-Net takes (1, K, J, I) and the spacing in that order. It looks at voxels, never at
        # directions, and HD-BET wants them as in MNI152 (its README: run fslreorient2std first):
        # j towards anterior, k towards superior. That is RAS, the order of `Volume.data`. (ITK's
        # LPS is about world coordinates; an array in that order would show a head turned round.)
        image = np.ascontiguousarray(volume.data.transpose(2, 1, 0))[None]
        properties = {"spacing": [float(s) for s in volume.spacing_mm[::-1]]}
        try:
            with _contained(), _never_waiting():
                labels = predictor.predict_single_npy_array(image, properties, None, None, False)
        except Exception as error:  # nnU-Net fails on odd scans in as many ways as they are odd
            raise _blame(volume.path, error) from error
        return np.asarray(labels).transpose(2, 1, 0) > 0

    return extract


def ensure_weights() -> Path:
    """Make sure that HD-BET's weights are whole, and fetch or repair them if they are not.

    Cheap where they are (reads them once, needs no network and no right to write). Else takes a zip
    file that the user has put there, or fetches it by HD-BET's own function; one process at a time,
    the others wait. Call it before worker processes start.

    Returns
    -------
    HD-BET's own folder of weights

    Raises
    ------
    ValueError : HD-BET is not installed; the weights cannot be had (one line: what to do by hand)
    OSError : the disk is full, or the folder may not be written
    """
    folder = Path(_module("paths").folder_with_parameter_files)
    if not _fault(folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock") as alone:
            if alone:
                for leftover in folder.glob(f"{SCRATCH}*"):  # of a run that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
            if fault := _fault(folder):  # another process may have mended it by now
                _supply(folder, fault)
    except OSError as error:
        raise OSError(f"{NAME}: its weights cannot be written to {folder} ({error}); make room or "
                      "give rights there, or use --brain-extraction deepbet") from error
    return folder


# --------------------------------------------------------------------------------------- weights


def _fault(folder: Path) -> str:
    """What is wrong with the weights in a folder ("" if nothing), every byte read."""
    if not any((folder / name).exists() for name in FILES):
        return "are not there"
    for name in FILES:
        try:
            if name == CHECKPOINT:  # a zip file itself; torch.load would not look at its CRCs
                with zipfile.ZipFile(folder / name) as archive:
                    whole = archive.testzip() is None
            else:
                whole = isinstance(json.loads((folder / name).read_bytes()), dict)
        except FileNotFoundError:
            return f"are damaged ({name} is missing)"
        except PermissionError:
            return f"are not to be used ({name} may not be read)"
        except Exception:  # a cut file shows in many ways, by where it was cut
            whole = False
        if not whole:
            return f"are damaged ({name} is cut or broken)"
    return ""


def _supply(folder: Path, fault: str) -> None:
    """Get whole weights into the folder; what else lies there stays."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
        source = _placed_by_hand(folder, Path(scratch)) or _fetch(folder, Path(scratch), fault)
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(source / name, folder / name)


def _placed_by_hand(folder: Path, scratch: Path) -> Path | None:
    """Whole weights that the user has put near the right place, zipped or unzipped."""
    # wget keeps the URL's end: "release_v1.5.0.zip?download=1"
    zipped = [path for place in (folder, folder.parent) for path in sorted(place.iterdir())
              if ".zip" in path.name and path.is_file()]
    unzipped = [found.parents[1] for found in sorted(folder.glob(f"[!.]*/{CHECKPOINT}"))]
    for path in [*zipped, *unzipped]:
        try:
            source = _unzip(path, scratch) if path.is_file() else path
            _prove(source)
        except _Unfit as error:
            log.warning("%s: %s is passed over: %s", NAME, path, error)
            continue
        log.info("%s: taking its weights from %s", NAME, path)
        return source
    return None


def _unzip(path: Path, scratch: Path) -> Path:
    """Unpack a zip file of weights, with or without a folder around them; returns their folder."""
    target = Path(tempfile.mkdtemp(dir=scratch))
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in map(PurePosixPath, archive.namelist())
                      if name.match(CHECKPOINT)]
            if not inside:
                raise _Unfit(f"it holds no {CHECKPOINT}")
            archive.extractall(target)
    except PermissionError:  # somebody else's; the folder to unpack into is ours
        raise _Unfit("it may not be read") from None
    except (OSError, _Unfit):
        raise
    except Exception:  # zipfile and zlib have many words for it
        raise _Unfit("it is no whole zip file; fetch it again") from None
    return target / inside[0].parents[1]


def _fetch(folder: Path, scratch: Path, fault: str) -> Path:
    """Fetch the weights by HD-BET's own function, and again if what comes is of no use."""
    url = _module("checkpoint_download").ZENODO_DOWNLOAD_URL
    log.info("%s: its weights in %s %s; fetching %s", NAME, folder, fault, url)
    start = time.monotonic()
    for left in reversed(range(TRIES)):
        try:
            new = _download(Path(scratch, f"try-{left}", "weights"))
            break
        except _Unfit as error:
            reason = str(error)
        shutil.rmtree(scratch / f"try-{left}", ignore_errors=True)
        if left:
            log.warning("%s: %s; trying again, %d left", NAME, reason, left)
            time.sleep(PAUSE_S)
    else:
        raise ValueError(
            f"{NAME}: its weights in {folder} {fault}, and cannot be fetched ({reason}); fetch "
            f"{url} elsewhere and put the zip file, as it is, into {folder}, or use "
            "--brain-extraction deepbet")
    try:
        _prove(new)
    except _Unfit as error:
        raise _misfit(url, error) from error
    log.info("%s: weights fetched and checked (%.0f s)", NAME, time.monotonic() - start)
    return new


def _download(new: Path) -> Path:
    """HD-BET's own download, into a folder of our choice; returns it."""
    module = _module("checkpoint_download")
    watched = sys.stderr is not None and sys.stderr.isatty()  # else its bar is noise in a log
    try:
        with _pointed(module, new), contextlib.nullcontext() if watched else _silent():
            module.maybe_download_parameters()
    except (module.requests.RequestException, ConnectionError, TimeoutError) as error:
        response = getattr(error, "response", None)  # of the server: it has answered with an error
        text = str(error).rsplit(": ", 1)[-1].strip("()'\" .")  # its cause comes last
        text += ")" * (text.count("(") - text.count(")"))
        raise _Unfit(f"{type(error).__name__}: {text}" if response is None
                     else f"the server answers {response.status_code}") from None
    except OSError:  # of the disk
        raise
    except Exception:  # a page about an error, a body cut off, no length given
        raise _Unfit("what the server sends is no whole zip file") from None
    if fault := _fault(new):
        raise _Unfit(f"in what the server sends they {fault}")
    return new


def _prove(folder: Path) -> None:
    """Load weights that are new here: files that are whole may still be the wrong ones."""
    import torch

    if fault := _fault(folder):
        raise _Unfit(f"its files {fault}")
    _load(folder, torch.device("cpu"), tta=False)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Wait until no other process is here; yields whether that is sure."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another process that fetches the weights (%s)", NAME, path)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            yield False
            return
        yield True


# ------------------------------------------------------------------------------------- predictor


def _device(name: str) -> Any:
    """The torch device of that name, if there is one here."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such device; take cpu or cuda[:K]") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here, "
                         "counted from 0; take another, or cpu")
    return device


def _load(folder: Path, device: Any, tta: bool) -> Any:
    """HD-BET's own predictor with the weights of a folder."""
    module = _module("hd_bet_prediction")
    try:
        with _contained(), _pointed(module, folder):
            predictor = module.get_hdbet_predictor(use_tta=tta, device=device)
    except Exception as error:  # foreign weights fail in as many ways as they have keys
        raise _Unfit(describe(error)) from error
    predictor.allow_tqdm = False
    return predictor


def _misfit(where: Path | str, error: _Unfit) -> ValueError:
    """One line about weights that are whole and of no use."""
    return ValueError(f"{NAME}: the weights in {where} do not load ({error}); they do not fit the "
                      "installed packages: pip install -U HD-BET nnunetv2, or use "
                      "--brain-extraction deepbet")


def _blame(path: Path, error: Exception) -> Exception:
    """One line about a prediction that failed: the scan's fault, or the machine's."""
    return machine_fault(path, "hd-bet", error) or NotNow(
        f"{path}: hd-bet failed ({describe(error)}); look at the scan, or give a mask with "
        "--brain-extraction mask")


# ------------------------------------------------------------------ keeping HD-BET in its own room


def _module(name: str) -> Any:
    """Import one of HD-BET's modules."""
    try:
        with _silent():
            return importlib.import_module(f"HD_BET.{name}")
    except ImportError as error:
        raise ValueError(f"{NAME}: {error}; pip install HD-BET") from error
    except Exception as error:  # packages that do not fit each other have many words for it
        raise ValueError(f"{NAME}: its package cannot be imported ({type(error).__name__}: "
                         f"{error}); pip install --force-reinstall HD-BET") from error


@contextlib.contextmanager
def _pointed(module: Any, folder: Path) -> Iterator[None]:
    """Let a module of HD-BET's take another folder for its weights, for a while."""
    before = module.folder_with_parameter_files
    module.folder_with_parameter_files = str(folder)
    try:
        yield
    finally:
        module.folder_with_parameter_files = before


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Leave sys.stdout as it was: importing HD-BET replaces it, and its helpers print."""
    before = sys.stdout
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(io.StringIO()):
        sys.stdout = sink
        try:
            yield
        finally:
            sys.stdout = before


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Undo what HD-BET sets for the whole process, too.

    It gives torch all cores (each worker has one thread, which always gives the same bits) and lets
    cuDNN try out algorithms (then the fastest of the day is taken, with bits of its own).
    """
    import torch

    threads, trying_out = torch.get_num_threads(), torch.backends.cudnn.benchmark
    try:
        with _silent():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = trying_out


class _Failure:
    """An item of nnU-Net's queue that raises where it is taken apart."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Iterator[Any]:
        raise self.error


@contextlib.contextmanager
def _never_waiting() -> Iterator[None]:
    """Pass on what fails in the thread that feeds nnU-Net's net.

    Where memory is short that thread may be the one that gets none; it ends, and nnU-Net would wait
    for its next item for ever.
    """
    module: Any = importlib.import_module("nnunetv2.inference.predict_from_raw_data")
    before = getattr(module, "Thread", None)

    def feeder(*, target: Callable, args: tuple, **how: Any) -> threading.Thread:
        def feed() -> None:
            try:
                target(*args)
            except Exception as error:
                args[-1].put(_Failure(error))

        return threading.Thread(target=feed, **how)

    module.Thread = feeder
    try:
        yield
    finally:
        module.Thread = before
