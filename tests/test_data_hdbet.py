"""HD-BET's real code on a model of a few weights, and its weights from a server that misbehaves."""

import functools
import itertools
import json
import logging
import resource
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import tiny_hdbet
import torch
from conftest import lay_affine, paint

from data import hdbet
from data.nifti import NotNow, volume_from_image

pytest.importorskip("HD_BET")
import HD_BET.checkpoint_download  # noqa: E402
import HD_BET.paths  # noqa: E402

ROOT = Path(__file__).parents[1]
SHAPE, VOXEL = (38, 48, 29), (4, 4, 5)
AFFINE = lay_affine(SHAPE, VOXEL)
OWN = HD_BET.checkpoint_download.folder_with_parameter_files
NO_GPU = not torch.cuda.is_available()
FLAT = pytest.mark.filterwarnings("ignore:divide by zero")  # of `odd`, within nnU-Net


def scan(data, affine=AFFINE, path="t1w.nii"):
    return volume_from_image(nib.Nifti1Image(np.asarray(data, np.float32), affine), path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model folders and the zip file of one, only to read."""
    root = tmp_path_factory.mktemp("models")
    found = {net: tiny_hdbet.build(root / net, net) for net in ("shifted", "random")}
    return SimpleNamespace(**found, zip=tiny_hdbet.zipped(root / "shifted", root / "release.zip"))


class Archive:
    """The place of HD-BET's zip file, on loopback; `answer` names how the next requests go."""

    def __init__(self, body):
        self.body, self.answer, self.requests = body, "whole", 0
        self.halfway, self.go_on = threading.Event(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}/release_v1.5.0.zip?download=1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def _handler(archive):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                archive.requests += 1
                archive.respond(self)

            def log_message(self, *args):
                pass

        return Handler

    def respond(self, to):
        body = b"<html>504 Gateway Time-out</html>" if self.answer == "page" else self.body
        to.send_response(503 if self.answer == "503" else 200)
        to.send_header("Content-Length", str(len(body)))
        to.end_headers()
        to.wfile.write(body[:len(body) // 2])
        to.wfile.flush()
        self.halfway.set()
        if self.answer == "hold":
            self.go_on.wait(60)
        if self.answer == "cut once":
            self.answer = "whole"
        elif self.answer != "cut":
            to.wfile.write(body[len(body) // 2:])


@pytest.fixture
def archive(models, monkeypatch):
    served = Archive(models.zip.read_bytes())
    monkeypatch.setattr(HD_BET.checkpoint_download, "ZENODO_DOWNLOAD_URL", served.url)
    monkeypatch.setattr(hdbet, "PAUSE_S", 0.01)
    yield served
    served.go_on.set()
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """HD-BET's folder of weights for this test, not there yet."""
    place = tmp_path / "hd-bet_params" / "release_2.0.0"
    monkeypatch.setattr(HD_BET.paths, "folder_with_parameter_files", str(place))
    monkeypatch.setenv("HOME", str(tmp_path))  # for child processes
    return place


@pytest.fixture
def offline(archive):
    archive.server.shutdown()
    archive.server.server_close()
    return archive


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "preprocess")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def predictors(monkeypatch):
    """Every predictor that HD-BET makes, in order."""
    import HD_BET.hd_bet_prediction as module

    made, make = [], module.get_hdbet_predictor
    monkeypatch.setattr(module, "get_hdbet_predictor",
                        lambda **how: made.append(make(**how)) or made[-1])
    return made


def child(code, *arguments):
    """A Python process in the repository; `code` finds its arguments in `sys.argv`."""
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *arguments], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


ENSURE = """
    import logging, sys
    import HD_BET.checkpoint_download as download
    from data import hdbet
    download.ZENODO_DOWNLOAD_URL = sys.argv[1]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    hdbet.ensure_weights()
"""


def assert_supplied(folder, models):
    """The weights are there, to the byte, and nothing else is."""
    names = {p.name for p in folder.iterdir()} - {"release_v1.5.0"}  # somebody's own folder stays
    assert names == {"dataset.json", "plans.json", "fold_all", ".lock"}
    for name in hdbet.FILES:
        assert (folder / name).read_bytes() == (models.shifted / name).read_bytes()
    assert HD_BET.checkpoint_download.folder_with_parameter_files == OWN, "was put back"


# ------------------------------------------------------------------------------------- the mask


def brighter(data):
    """Where `tiny_hdbet`'s net says brain, but for its shift: the same rule on the same crop."""
    crop = data[np.ix_(*(np.flatnonzero((data != 0).any(axis=others))
                         for others in ((1, 2), (0, 2), (0, 1))))]
    return data > crop.mean() + tiny_hdbet.THRESHOLD * crop.std()


@pytest.fixture
def shifted(models, folder):
    tiny_hdbet.copied(models.shifted, folder)
    return hdbet.make_extractor("cpu")


def test_the_net_sees_axes_directions_and_spacing_as_hd_bet_was_trained(shifted):
    up, front, _ = tiny_hdbet.SPACING_MM  # the net looks one of its voxels up and to the front
    got = shifted(scan(paint(SHAPE, AFFINE)))
    assert got.shape == SHAPE and got.dtype == bool

    def error(*shift_mm):
        moved = np.eye(4)
        moved[:3, 3] = shift_mm
        return (got != brighter(paint(SHAPE, AFFINE, matrix=moved))).mean()

    assert error(0, -front, -up) < 0.004
    for wrong in ((0, 0, 0), (0, front, -up), (0, -front, up), (0, front, up), (-front, 0, -up),
                  (-up, -front, 0), (-front, -up, 0), (0, -up, -front)):
        assert error(*wrong) > 0.008, wrong


@pytest.mark.parametrize("axes", ["LPS", "PIR", "SAL"])
def test_the_mask_lies_at_the_same_place_in_the_head_however_the_file_runs(shifted, axes):
    straight = scan(paint(SHAPE, AFFINE))
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE),
                                           nib.orientations.axcodes2ornt(axes))
    turned = nib.Nifti1Image(straight.data, AFFINE).as_reoriented(turn)
    assert turned.shape != SHAPE or axes == "LPS"
    np.testing.assert_array_equal(shifted(volume_from_image(turned)), shifted(straight))


def test_the_same_scan_gives_the_same_bits_and_the_predictor_is_loaded_once(
        models, folder, predictors):
    tiny_hdbet.copied(models.shifted, folder)
    extract = hdbet.make_extractor("cpu")
    volume = scan(paint(SHAPE, AFFINE))
    first = extract(volume)
    other = extract(scan(paint(SHAPE, AFFINE, person=3)))
    assert (other != first).any()
    np.testing.assert_array_equal(extract(volume), first)
    assert len(predictors) == 1 and not predictors[0].allow_tqdm


@pytest.mark.parametrize("tta", [False, True])
def test_test_time_augmentation_is_the_mean_over_the_mirrored_volumes(models, folder, tta,
                                                                      predictors):
    tiny_hdbet.copied(models.random, folder)
    shape = tiny_hdbet.PATCH[::-1]  # the net's own grid: nothing is resampled or tiled
    data = np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32)
    got = hdbet.make_extractor("cpu", tta=tta)(
        scan(data, lay_affine(shape, tiny_hdbet.SPACING_MM[::-1])))
    x = torch.from_numpy((data - data.mean()) / data.std()).permute(2, 1, 0)[None, None]
    network = predictors[0].network
    sides = [c for n in range(4) for c in itertools.combinations((2, 3, 4), n)]
    with torch.inference_mode():
        votes = [network(x.flip(axes)).flip(axes) for axes in sides]
    expected = {kind: logits[0].argmax(0).permute(2, 1, 0).bool().numpy()
                for kind, logits in ((False, votes[0]), (True, torch.stack(votes).mean(0)))}
    assert (expected[False] != expected[True]).mean() > 0.05
    middle = tuple(slice(n // 4, -n // 4) for n in shape)  # nnU-Net trusts a window's rim little
    assert (got != expected[tta])[middle].mean() < 0.002, "up to the rounding of half precision"


def test_the_device_reaches_the_predictor_by_its_number(models, folder, predictors, monkeypatch):
    tiny_hdbet.copied(models.shifted, folder)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    hdbet.make_extractor("cuda:1")
    assert predictors[0].device == torch.device("cuda:1")
    assert predictors[0].perform_everything_on_device


@pytest.mark.parametrize("device", ["cuda:7", "graphics"])
def test_a_device_that_is_not_there_is_refused_before_any_subject(models, folder, device):
    tiny_hdbet.copied(models.shifted, folder)
    with pytest.raises(ValueError, match=f"--device {device}: "):
        hdbet.make_extractor(device)


@FLAT
def test_threads_and_cudnns_choice_stay_as_they_were(models, folder, monkeypatch):
    tiny_hdbet.copied(models.shifted, folder)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        extract = hdbet.make_extractor("cpu")
        assert torch.get_num_threads() == 3
        extract(scan(paint(SHAPE, AFFINE)))
        with pytest.raises(ValueError):
            extract(odd())
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert not torch.backends.cudnn.benchmark
    hdbet.make_extractor("cuda")
    assert not torch.backends.cudnn.benchmark


def odd():
    """A scan with a header in wrong units: on the net's grid nothing is left of it."""
    return scan(paint(SHAPE, AFFINE), AFFINE @ np.diag([1, 1, 0.01, 1]), "sub-07_T1w.nii.gz")


@FLAT
def test_a_scan_that_hd_bet_fails_on_is_named_and_the_next_one_works(shifted):
    with pytest.raises(ValueError, match=r"^sub-07_T1w.nii.gz: hd-bet failed \(\w+Error: .*mask$"):
        shifted(odd())
    assert shifted(scan(paint(SHAPE, AFFINE))).any()


@pytest.mark.parametrize("error, kind, text", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), NotNow,
     "^t1w.nii: no memory left .*--workers.*--device cpu"),
    (MemoryError(), NotNow, "^t1w.nii: no memory left"),
    (RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors"), OSError,
     "the GPU failed at t1w.nii"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), OSError, "the GPU failed"),
    (RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu."), OSError,
     "the GPU failed"),
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), NotNow,
     "^t1w.nii: no memory left"),
    (RuntimeError("shape mismatch"), NotNow, "^t1w.nii: hd-bet failed .*shape mismatch"),
], ids=["GPU memory", "memory", "GPU", "cuDNN", "driver", "cuBLAS memory", "other"])
def test_want_of_memory_leaves_a_scan_out_and_a_broken_gpu_ends_the_run(models, folder, predictors,
                                                                        error, kind, text):
    tiny_hdbet.copied(models.shifted, folder)
    extract = hdbet.make_extractor("cpu")

    def fail(*args):
        raise error

    predictors[0].network.forward = fail
    with pytest.raises(kind, match=text) as caught:
        extract(scan(paint(SHAPE, AFFINE)))
    assert "\n" not in str(caught.value)


def test_want_of_memory_in_nnunets_own_thread_leaves_a_scan_out_instead_of_waiting_for_ever(
        shifted, monkeypatch):
    volume = scan(paint(SHAPE, AFFINE))

    def fail(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "clone", fail)
    with pytest.raises(ValueError, match="no memory left"):
        shifted(volume)
    monkeypatch.undo()
    assert shifted(volume).any()


def test_importing_loading_and_predicting_print_nothing_and_start_no_process(models, folder):
    tiny_hdbet.copied(models.shifted, folder)
    code = """
        import io, multiprocessing.process, sys
        sys.path.insert(0, "tests")
        out, err = sys.stdout, sys.stderr
        mine = sys.stdout = io.StringIO()
        from test_data_hdbet import hdbet, paint, scan, AFFINE, SHAPE
        assert "nnunetv2" not in sys.modules
        def start(self):
            raise AssertionError("a process was started")
        multiprocessing.process.BaseProcess.start = start
        extract = hdbet.make_extractor("cpu")
        assert "nnunetv2" in sys.modules and sys.stdout is mine and sys.stderr is err
        assert extract(scan(paint(SHAPE, AFFINE))).any()
        assert sys.stdout is mine and sys.stderr is err
        print(repr(mine.getvalue()), file=out)
    """
    process = child(code)
    assert process.communicate(timeout=120) == ("''\n", "")
    assert process.returncode == 0


@pytest.mark.cuda
@pytest.mark.skipif(NO_GPU, reason="needs a CUDA GPU")
def test_on_a_gpu_the_mask_is_the_cpus(models, folder):
    tiny_hdbet.copied(models.shifted, folder)
    volume = scan(paint(SHAPE, AFFINE))
    on_cpu, on_gpu = (hdbet.make_extractor(d)(volume) for d in ("cpu", "cuda:0"))
    assert on_gpu.any() and (on_cpu != on_gpu).mean() < 0.002
    np.testing.assert_array_equal(hdbet.make_extractor("cuda:0")(volume), on_gpu)


# ----------------------------------------------------------------------------------- the weights


def test_whole_weights_are_used_as_they_are_without_network_and_without_writing(
        models, folder, archive, said):
    tiny_hdbet.copied(models.shifted, folder)
    before = {p: p.stat().st_mtime_ns for p in (folder, *folder.rglob("*"))}
    assert hdbet.ensure_weights() == folder
    assert {p: p.stat().st_mtime_ns for p in (folder, *folder.rglob("*"))} == before
    assert archive.requests == 0 and said() == []


def test_missing_weights_are_fetched_and_checked_by_loading(models, folder, archive, predictors,
                                                            said):
    assert hdbet.ensure_weights() == folder
    assert_supplied(folder, models)
    assert archive.requests == 1 and len(predictors) == 1
    start, end = said()
    assert archive.url in start and str(folder) in start and "fetched and checked" in end


def test_a_body_cut_off_once_is_fetched_again(models, folder, archive, said):
    archive.answer = "cut once"
    hdbet.ensure_weights()
    assert_supplied(folder, models)
    assert archive.requests == 2
    assert "trying again, 2 left" in said()[1]


def impatient(monkeypatch):
    """HD-BET waits 100 s for a server that has stalled; a test waits less."""
    requests = HD_BET.checkpoint_download.requests
    monkeypatch.setattr(requests, "get", functools.partial(
        lambda get, url, stream, timeout: get(url, stream=stream, timeout=0.2), requests.get))


@pytest.mark.parametrize("answer, reason", [
    ("cut", "ChunkedEncodingError"), ("page", "no whole zip file"), ("hold", "timed out"),
    ("503", "the server answers 503"), ("other", r"they are not there\)"),
])
def test_what_cannot_be_had_is_one_line_with_url_folder_and_the_way_out(
        models, folder, archive, monkeypatch, tmp_path, answer, reason):
    archive.answer = answer
    if answer == "hold":  # a busy machine may take longer for the others' answers
        impatient(monkeypatch)
    if answer == "other":
        with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
            other.writestr("readme.txt", "moved")
        archive.body = (tmp_path / "other.zip").read_bytes()
    with pytest.raises(ValueError, match=reason) as caught:
        hdbet.make_extractor("cpu")
    text = str(caught.value)
    assert archive.url in text and f"into {folder}" in text and "deepbet" in text
    assert "\n" not in text
    assert archive.requests == hdbet.TRIES
    assert [p.name for p in folder.iterdir()] == [".lock"], "nothing half is left"


@pytest.fixture
def misfit(models, tmp_path):
    """Whole weights that the net of their plans cannot take."""
    plans = json.loads((models.shifted / "plans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["arch_kwargs"]["features_per_stage"] = [3, 4]
    place = tiny_hdbet.copied(models.shifted, tmp_path / "misfit")
    (place / "plans.json").write_text(json.dumps(plans))
    return place


@pytest.mark.parametrize("fetched", [True, False])
def test_weights_that_are_whole_and_do_not_load_are_said_as_such_and_fetched_once_at_most(
        folder, archive, misfit, tmp_path, fetched):
    if fetched:
        archive.body = tiny_hdbet.zipped(misfit, tmp_path / "misfit.zip").read_bytes()
    else:
        tiny_hdbet.copied(misfit, folder)
    place = archive.url if fetched else folder
    with pytest.raises(ValueError, match=r"RuntimeError.*state_dict.*pip install -U HD-BET nnunet"
                       ) as caught:
        hdbet.make_extractor("cpu")
    assert f"the weights in {place} do not load" in str(caught.value)
    assert archive.requests == fetched and (folder / hdbet.CHECKPOINT).exists() != fetched


def test_offline_says_where_to_put_which_file_by_hand(folder, offline):
    with pytest.raises(ValueError, match="not there, and cannot be fetched .*refused") as caught:
        hdbet.ensure_weights()
    text = str(caught.value)
    assert f"fetch {offline.url} elsewhere and put the zip file, as it is, into {folder}" in text
    assert "or use --brain-extraction deepbet" in text and "\n" not in text and len(text) < 500


def cut_checkpoint(folder):
    checkpoint = folder / hdbet.CHECKPOINT
    checkpoint.write_bytes(checkpoint.read_bytes()[:-500])


def flip_a_byte(folder):
    checkpoint = folder / hdbet.CHECKPOINT
    content = bytearray(checkpoint.read_bytes())
    place = content.index(b"nnUNetTrainer")
    content[place] ^= 1
    checkpoint.write_bytes(content)


def cut_plans(folder):
    (folder / "plans.json").write_text((folder / "plans.json").read_text()[:900])


def lose_dataset(folder):
    (folder / "dataset.json").unlink()


DAMAGES = [cut_checkpoint, flip_a_byte, cut_plans, lose_dataset]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_half_unzipped_folder_is_mended(models, folder, archive, said, damage):
    tiny_hdbet.copied(models.shifted, folder)
    damage(folder)
    hdbet.ensure_weights()
    assert_supplied(folder, models)
    assert "are damaged" in said()[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_half_unzipped_folder_is_not_believed_offline_either(models, folder, offline, damage):
    tiny_hdbet.copied(models.shifted, folder)
    damage(folder)
    name = {cut_plans: "plans.json", lose_dataset: "dataset.json"}.get(damage, hdbet.CHECKPOINT)
    with pytest.raises(ValueError, match=rf"are damaged \({name} .*cannot be fetched"):
        hdbet.make_extractor("cpu")


@pytest.mark.parametrize("name, inside", [
    ("release_2.0.0/release_v1.5.0.zip", ""), ("release_v1.5.0.zip", ""),
    ("release_2.0.0/release_v1.5.0.zip?download=1", ""),
    ("release_2.0.0/weights.zip", "release_v1.5.0/"),
])
def test_a_zip_file_put_there_by_hand_is_taken_and_stays(models, folder, offline, said, name,
                                                         inside):
    folder.mkdir(parents=True)
    placed = tiny_hdbet.zipped(models.shifted, folder.parent / name, inside=inside)
    hdbet.make_extractor("cpu")
    assert placed.is_file()
    placed.unlink()
    assert_supplied(folder, models)
    assert said() == [f"{hdbet.NAME}: taking its weights from {placed}"]


def test_a_release_unzipped_into_a_folder_of_its_own_is_taken(models, folder, offline):
    tiny_hdbet.copied(models.shifted, folder / "release_v1.5.0")
    hdbet.ensure_weights()
    assert_supplied(folder, models)


def test_a_damaged_zip_file_put_there_by_hand_is_named_and_passed_over(models, folder,
                                                                       archive, said):
    folder.mkdir(parents=True)
    (folder / "release.zip.part").write_bytes(models.zip.read_bytes()[:5000])
    (folder / "mine.zip").write_bytes(b"")
    hdbet.ensure_weights()
    assert archive.requests == 1 and not hdbet._fault(folder)
    assert "release.zip.part is passed over: it is no whole zip file" in said()[1]


def test_a_zip_file_that_may_not_be_read_is_passed_over(models, folder, archive, said, monkeypatch):
    folder.mkdir(parents=True)
    (folder / "secret.zip").write_bytes(models.zip.read_bytes())
    opened = zipfile.ZipFile

    def of_others(path, *arguments, **options):
        if "secret" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(hdbet.zipfile, "ZipFile", of_others)
    hdbet.ensure_weights()
    assert archive.requests == 1 and not hdbet._fault(folder)
    assert "secret.zip is passed over: it may not be read" in said()[0]


def test_a_full_disk_is_said_as_such_and_leaves_no_litter(folder, archive):
    archive.body = bytes(1_000_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written to .*File too large.*make room"):
            hdbet.ensure_weights()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert archive.requests == 1 and [p.name for p in folder.iterdir()] == [".lock"]


def test_killed_in_the_middle_of_the_download_the_next_run_fetches_anew(models, folder, archive):
    archive.answer = "hold"
    process = child(ENSURE, archive.url)
    while not list(folder.glob(".fetch-*/*/tmp_download.zip")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (folder / hdbet.CHECKPOINT).exists()
    archive.answer = "whole"
    hdbet.ensure_weights()
    assert_supplied(folder, models)


@pytest.mark.parametrize("own", [True, False], ids=["here", "in hd-bet itself"])
def test_killed_in_the_middle_of_unzipping_the_next_run_mends_it(models, folder, archive, own):
    code = """
        import os, signal, sys, zipfile
        def extract_half(archive, to):
            archive.extract("plans.json", to)
            os.makedirs(os.path.join(to, "fold_all"))
            content = archive.read("fold_all/checkpoint_final.pth")
            with open(os.path.join(to, "fold_all/checkpoint_final.pth"), "wb") as half:
                half.write(content[:len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        zipfile.ZipFile.extractall = extract_half
    """
    run = "hdbet.ensure_weights()" if own else "download.maybe_download_parameters()"
    ours = ENSURE.replace("hdbet.ensure_weights()", run)
    process = child(textwrap.dedent(code) + textwrap.dedent(ours), archive.url)
    process.communicate()
    assert process.returncode == -9
    assert (folder / hdbet.CHECKPOINT).exists() != own
    hdbet.ensure_weights()
    (folder.parent / "tmp_download.zip").unlink(missing_ok=own)  # HD-BET's own
    assert_supplied(folder, models)


def test_two_processes_at_once_fetch_once_and_the_second_says_that_it_waits(models, folder,
                                                                            archive, said):
    archive.answer = "hold"
    first = threading.Thread(target=hdbet.ensure_weights)
    first.start()
    assert archive.halfway.wait(60)
    second = child(ENSURE, archive.url)
    assert "waiting for another process" in second.stdout.readline()
    archive.go_on.set()
    first.join()
    rest, errors = second.communicate()
    assert (second.returncode, rest, errors) == (0, "", "")
    assert archive.requests == 1
    assert_supplied(folder, models)


@pytest.mark.parametrize("terminal", [False, True])
def test_hd_bets_bar_shows_on_a_terminal_only(folder, archive, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    hdbet.ensure_weights()
    out, errors = capsys.readouterr()
    assert out == "" and ("100%" in errors) == terminal and bool(errors) == terminal


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "HD_BET", None)
    monkeypatch.delitem(sys.modules, "HD_BET.paths")
    with pytest.raises(ValueError, match="hd-bet: .*HD_BET.*; pip install HD-BET"):
        hdbet.make_extractor("cpu")


def test_a_package_that_breaks_while_it_is_imported_is_one_error(monkeypatch):
    def broken(name):
        raise AttributeError("module 'numpy' has no attribute 'bool8'")

    monkeypatch.setattr(hdbet.importlib, "import_module", broken)
    with pytest.raises(ValueError, match="hd-bet: .*AttributeError: .*bool8.*; pip install -"):
        hdbet.make_extractor("cpu")
