"""`rdpm eval report`: the chain and its broken links, scores beside published ones, a page that needs nothing else."""

import csv
import http.server
import importlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdpm_cli import engine, files, modelfile
from rdpm_cli.cli.app import run as run_cli
from rdpm_cli.engine import report_inputs, reporting
from rdpm_cli.errors import DataError, RdpmError, UsageError
from rdpm_cli.evaluation import judge
from rdpm_cli.evaluation.report import chain, pictures, plots, scores
from rdpm_cli.evaluation.report.parts import Claim, Item, Score, clean
from rdpm_cli.evaluation.report.published import PUBLISHED

CLASSES = ["<script>", "b&b"]
TOKENIZER = [
    "autoencoder.width=8", "autoencoder.channels=8", "autoencoder.res_blocks=1", "quantizer.codes=64",
    "quantizer.steps=2", "train.steps=2", "train.batch=16", "train.log_every=1", "train.eval_every=2",
]  # fmt: skip
GENERATOR = ["network.depth=1", "train.steps=2", "train.batch=16", "train.log_every=1", "train.eval_every=2"]
VOID = {"meta", "img", "br", "hr", "link", "input"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole chain, tiny: images/ of two classes, tok/, codes/, gen/, judge.pt, samples/, recon/, two score files."""
    root = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    for name in CLASSES:
        (root / "images" / name).mkdir(parents=True)
        for place in range(8):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{place}.png")
    images = str(root / "images")
    engine.train_tokenizer(images, root / "tok", "digits", TOKENIZER, device="cpu")
    engine.tokenize(images, root / "codes", root / "tok" / "tokenizer.pt", device="cpu")
    engine.train_gen(root / "codes", root / "gen", "digits", GENERATOR, device="cpu")
    outputs = engine.Outputs(gif=True)
    engine.sample(root / "gen" / "generator.pt", per_class=3, out=root / "samples", outputs=outputs, device="cpu")
    engine.reconstruct(images, root / "recon", root / "tok" / "tokenizer.pt", device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        content = judge.pack(judge.Judge(16, 8, 8, 2), CLASSES, provenance={"heldout_accuracy": 0.5, "data": images})
    modelfile.save(root / "judge.pt", content)
    fid = engine.eval_fid(str(root / "samples"), extractor=root / "judge.pt", device="cpu").values
    files.write_json(root / "fid.json", fid)
    recon = engine.eval_recon(
        images, root / "tok" / "tokenizer.pt", seeds=2, extractor=root / "judge.pt", device="cpu"
    ).values
    files.write_json(root / "recon.json", recon)
    return root


PARTS = ["tok", "codes", "gen", "judge.pt", "samples", "recon", "fid.json", "recon.json"]


def report(made: Path, out: Path, parts: list[str] = PARTS, **options: Any) -> engine.Result:
    return engine.make_report([made / part for part in parts], out, **options)


@pytest.fixture(scope="module")
def page(made: Path) -> Path:
    """The page of the whole chain."""
    report(made, made / "report.html")
    return made / "report.html"


# ---- the page ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Every start tag with its attributes, all text outside of style, and whether every tag is closed in its order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def named(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def test_the_page_is_well_formed_and_names_nothing_outside_itself(page: Path) -> None:
    read = Page(page)
    assert read.open == []
    for _, attributes in read.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
        assert not [name for name in attributes if name.startswith("on")]
    anchors = {attributes["id"] for _, attributes in read.tags if "id" in attributes}
    assert {link["href"] for link in read.named("a")} == {f"#{anchor}" for anchor in anchors}
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|<script|<link|<iframe", text)
    assert "default-src 'none'; img-src data:" in read.named("meta")[2]["content"]


def test_every_picture_says_what_it_shows(page: Path) -> None:
    images = Page(page).named("img")
    assert len(images) >= 10
    for image in images:
        assert len(image["alt"]) > 20
        assert int(image["width"]) > 0
        assert int(image["height"]) > 0


def test_what_comes_from_files_is_text_and_never_markup(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "<script>, b&b" in Page(page).text


def test_the_page_shows_the_whole_chain_and_every_section(page: Path) -> None:
    read = Page(page)
    for part in PARTS:
        assert str(page.parent / part) in read.text
    assert [s["id"] for s in read.named("section")] == ["chain", "scores", "published", "curves", "per-t", "pictures",
                                                       "settings"]  # fmt: skip
    assert modelfile.load(page.parent / "gen" / "generator.pt")["digest"] in read.text
    assert "not comparable" in read.text
    assert "not yet run" in read.text
    assert "✗" not in read.text


def test_the_same_inputs_give_the_same_bytes(made: Path, page: Path, tmp_path: Path) -> None:
    report(made, tmp_path / "same.html", [*PARTS[4:], *PARTS[:4]])  # other stages first
    assert (tmp_path / "same.html").read_bytes() == page.read_bytes()


def test_a_grid_is_made_of_the_folders_files_where_there_is_none(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "samples", tmp_path / "samples"))
    shutil.rmtree(folder / "previews")
    engine.make_report([folder], tmp_path / "report.html")
    (image,) = Page(tmp_path / "report.html").named("img")
    assert image["alt"] == "The first 3 pictures of each class, a class a row: <script>, b&b."


def test_more_pictures_than_a_page_holds_are_left_out_with_a_note(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "MOST_PICTURES", 2)
    report(made, tmp_path / "report.html", ["tok", "gen", "samples", "recon"])
    assert "3 more pictures were left out" in Page(tmp_path / "report.html").text


# ---- in a browser --------------------------------------------------------------------------------------------------

WIDTH = 390
HARNESS = f"""<!DOCTYPE html><title>harness</title><link rel="icon" href="data:,">
<iframe style="border:0;width:{WIDTH}px;height:844px" src="/report.html"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = async () => {{
  const page = frame.contentDocument, images = [...page.images];
  await Promise.all(images.map(image => image.decode().catch(() => 0)));
  const asked = frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
  fetch("/result", {{method: "POST", body: JSON.stringify({{
    images: images.length, broken: images.filter(image => !image.naturalWidth).length,
    width: page.documentElement.scrollWidth, asked: asked.filter(name => !name.startsWith("data:")),
    wide: [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll") &&
      e.getBoundingClientRect().right > {WIDTH} + 1).length}})}});
}};
</script>"""


class Server(http.server.BaseHTTPRequestHandler):
    """The harness, the page, and what the harness found out about it."""

    page: bytes
    paths: list[str]
    found: list[dict[str, Any]]
    done: threading.Event

    def do_GET(self) -> None:
        self.paths.append(self.path)
        body = self.page if self.path == "/report.html" else HARNESS.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.found.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()
        self.done.set()

    def log_message(self, format: str, *args: Any) -> None: ...


def browser() -> list[str] | None:
    """The command that opens an address in a browser without a screen; None where there is none."""
    chrome = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return [found, *chrome, "--user-data-dir={profile}"]
    if importlib.util.find_spec("playwright"):
        with importlib.import_module("playwright.sync_api").sync_playwright() as installed:
            if Path(installed.chromium.executable_path).is_file():
                return [installed.chromium.executable_path, *chrome, "--user-data-dir={profile}"]
    if found := shutil.which("firefox") or shutil.which("firefox-esr"):
        return [found, "--headless", "--profile", "{profile}"]
    return None


@pytest.fixture
def served(page: Path) -> Iterator[type[Server]]:
    """A server of the page on this machine alone; its address is in `paths[0]` until the first request."""

    class Own(Server):
        page: bytes
        paths: list[str] = []  # noqa: RUF012
        found: list[dict[str, Any]] = []  # noqa: RUF012
        done = threading.Event()

    Own.page = page.read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    Own.paths.append(f"http://127.0.0.1:{server.server_port}/")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Own
    server.shutdown()
    server.server_close()


def test_in_a_browser_it_fits_a_phone_and_asks_for_nothing(served: type[Server], tmp_path: Path) -> None:
    command = browser()
    if command is None:
        pytest.skip("no chromium, chrome or firefox on PATH, and no browser of playwright")
    address = served.paths.pop()
    words = [word.format(profile=tmp_path / "profile") for word in command]
    (tmp_path / "profile").mkdir()
    process = subprocess.Popen(
        [*words, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        assert served.done.wait(60), "the browser said nothing"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (found,) = served.found
    assert found["images"] >= 10
    assert found == {"images": found["images"], "broken": 0, "width": found["width"], "asked": [], "wide": 0}
    assert found["width"] <= WIDTH
    assert served.paths == ["/", "/report.html"]


# ---- the chain -----------------------------------------------------------------------------------------------------


def states(made: Path, out: Path, parts: list[str]) -> dict[str, int]:
    found: dict[str, int] = report(made, out, parts).values["links"]
    return found


def test_every_link_of_a_whole_chain_matches(made: Path, tmp_path: Path) -> None:
    found = states(made, tmp_path / "report.json", PARTS)
    assert (found["broken"], found["absent"]) == (0, 0)
    assert found["matches"] == 15


def test_another_tokenizer_breaks_the_chain(made: Path, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    out = tmp_path / "report.html"
    given = [tiny_tokenizer_file, *(made / part for part in PARTS if part != "tok")]
    links = engine.make_report(given, out).values["links"]
    assert links["broken"] == 4  # the store's, the generator's, the reconstructions' and their score's
    text = Page(out).text
    assert "✗ broken" in text
    assert f"is {modelfile.load(tiny_tokenizer_file)['digest'][:12]}" in text


def test_changed_pictures_are_not_those_that_were_scored(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "samples", tmp_path / "samples"))
    score = files.read_json(made / "fid.json")
    score["target"]["name"] = str(folder)
    files.write_json(tmp_path / "fid.json", score)
    given = [folder, tmp_path / "fid.json", made / "judge.pt"]
    assert engine.make_report(given, tmp_path / "a.json").values["links"]["broken"] == 0
    Image.new("RGB", (16, 16)).save(folder / "000000.png")
    assert engine.make_report(given, tmp_path / "a.json").values["links"]["broken"] == 1


def test_pixels_of_too_many_pictures_are_not_compared_and_it_is_said(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "MOST_COMPARED", 5)
    engine.make_report([made / "samples", made / "fid.json"], tmp_path / "a.json")
    said = [one["facts"].get("pixels compared with scores") for one in files.read_json(tmp_path / "a.json")["chain"]]
    assert said.count("no: more than 5 pictures") == 1


def test_what_was_not_given_is_absent_and_not_broken(made: Path, tmp_path: Path) -> None:
    assert states(made, tmp_path / "a.json", ["gen"]) == {"matches": 0, "broken": 0, "absent": 3}
    assert states(made, tmp_path / "a.json", ["fid.json", "recon"])["broken"] == 0


def item(stage: Any, name: str, digest: str, *claims: Claim) -> Item:
    return Item(stage=stage, name=name, digest=digest, claims=claims)


def found_states(*items: Item) -> list[list[str]]:
    return [[link.state for link in row] for row in chain.links(items)]


def test_a_tokenizer_that_another_claims_breaks_no_link() -> None:
    """Two runs are compared, and the tokenizer of one alone is given."""
    own, other = (Claim(stages=("tokenizer",), digest=digest) for digest in ("one", "two"))
    tokenizer = item("tokenizer", "tok", "one")
    assert found_states(tokenizer, item("store", "a", "A", own), item("store", "b", "B", other)) == [
        [], ["matches"], ["absent"]
    ]  # fmt: skip
    assert found_states(tokenizer, item("store", "b", "B", other)) == [[], ["broken"]]


def test_images_of_one_name_and_two_digests_are_a_broken_link() -> None:
    now, then = (Claim(stages=("data",), digest=digest, name="train") for digest in ("now", "then"))
    items = chain.with_images([item("tokenizer", "t", "T", now), item("store", "s", "S", then)])
    assert [one.stage for one in items] == ["data", "data", "tokenizer", "store"]
    assert found_states(*items)[2:] == [["broken"], ["broken"]]
    same = chain.with_images([item("tokenizer", "t", "T", now), item("store", "s", "S", now)])
    assert found_states(*same) == [[], ["matches"], ["matches"]]


def test_a_copy_of_a_model_and_a_run_given_twice_are_one(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "tok" / "tokenizer.pt", tmp_path / "copy.pt")
    given = [tmp_path / "copy.pt", made / "tok", made / "tok" / ".." / "tok"]
    (found,) = report_inputs.read(given, with_pictures=False)
    assert found.item.name == str(made / "tok")
    assert found.item.facts["also"] == str(tmp_path / "copy.pt")


def test_an_unfinished_run_is_shown_as_such(made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made / "gen", tmp_path / "gen"))
    (run / "generator.pt").unlink()
    (found,) = report_inputs.read([run], with_pictures=False)
    assert found.item.facts["steps"] == "2, unfinished"
    assert [claim.stages for claim in found.item.claims] == [("store",)]
    engine.make_report([run, made / "codes"], tmp_path / "report.html")
    assert "unfinished" in Page(tmp_path / "report.html").text


def test_a_demos_folder_is_its_parts(made: Path, tmp_path: Path) -> None:
    (tmp_path / "demo" / "runs").mkdir(parents=True)
    for part, place in {"tok": "runs/tokenizer", "gen": "runs/generator", "codes": "codes"}.items():
        shutil.copytree(made / part, tmp_path / "demo" / place)
    result = {"frechet_distance": 3.5, "frechet_n": 20, "frechet_ratio": 2.0, "class_accuracy": 0.9, "samples": 80,
              "reference": {"name": "digits:train"}}  # fmt: skip
    files.write_json(tmp_path / "demo" / "result.json", result)
    found = report_inputs.read([tmp_path / "demo"], with_pictures=False)
    assert [one.item.stage for one in found] == ["tokenizer", "store", "generator", "score"]
    assert {s.metric: (s.value, s.n) for s in found[-1].scores} == {
        "frechet_distance": (3.5, 20), "class_accuracy": (0.9, 80)
    }  # fmt: skip


# ---- scores --------------------------------------------------------------------------------------------------------


def test_scores_of_every_shape_are_read() -> None:
    one = {"metric": "fid", "value": 3.5, "n": 10, "spread_over_subsets": 0.2, "subsets": 4,
           "class_accuracy": 0.5, "extractor": {"name": "x"}, "reference": {"name": "r"},
           "options": {"cfg": 1.5, "micro_batch": 2}}  # fmt: skip
    read = scores.read(one, "a.json")
    assert [(s.metric, s.value, s.n) for s in read] == [("fid", 3.5, 10), ("class_accuracy", 0.5, 10)]
    assert (read[0].spread, read[0].spread_over, read[1].spread) == (0.2, "over 4 subsets", None)
    assert (read[0].extractor, read[0].reference, read[0].options) == ("x", "r", {"cfg": 1.5})
    many = {"metric": "all", "fid": 2.0, "fid_ci95": [1.5, 2.5], "fid_n": 6, "n": 7, "inception_score": 30.5,
            "inception_score_splits": 10, "inception_score_spread_over_splits": 0.1, "inception_score_order_free": 31.5,
            "inception_score_order_free_ci95": [31, 32], "sfid": None, "not_computed": {"sfid": "pooled"}}  # fmt: skip
    read = scores.read(many, "b.json")
    assert [(s.metric, s.value, s.n) for s in read] == [
        ("fid", 2.0, 6), ("inception_score", 30.5, 7), ("inception_score_order_free", 31.5, 7), ("sfid", None, 7)
    ]  # fmt: skip
    assert [s.interval for s in read] == [(1.5, 2.5), None, (31.0, 32.0), None]
    assert (read[1].spread, read[1].spread_over, read[3].note) == (0.1, "over 10 splits", "pooled")
    alone = {"metric": "inception_score", "value": None, "order_free": 3.5, "order_free_ci95": [3, 4], "n": 5,
             "reference": None, "not_computed": {"value": "sorted"}}  # fmt: skip
    by_split, order_free = scores.read(alone, "c.json")
    assert (by_split.value, by_split.note) == (None, "sorted")
    assert (order_free.metric, order_free.value, order_free.interval) == ("inception_score_order_free", 3.5, (3.0, 4.0))
    pair = {"metric": "precision_recall", "precision": 0.5, "recall": 0.25, "reference": {"name": "r"}}
    assert [(s.metric, s.value) for s in scores.read(pair, "d.json")] == [("precision", 0.5), ("recall", 0.25)]


def test_what_was_not_computed_keeps_its_reason_and_nan_is_no_number() -> None:
    record = {"metric": "reconstruction", "psnr": math.nan, "rfid": None, "frechet_distance": 1.5, "seeds": [0, 1],
              "not_computed": {"rfid": "weights absent"}, "spread_over_seeds": {"frechet_distance": 0.5}}  # fmt: skip
    read = {s.metric: s for s in scores.read(record, "r.json")}
    assert (read["psnr"].value, read["rfid"].value, read["rfid"].note) == (None, None, "weights absent")
    assert read["frechet_distance_recon"].spread_over == "over 2 noise seeds"


@pytest.mark.parametrize("record", [{}, [], 3, {"metric": "fid"}, {"value": 3}, {"loss": 1.0}, {"reference": {}}])
def test_other_json_is_no_score(record: Any) -> None:
    assert not scores.is_record(record)


def adm(**changes: Any) -> Score:
    whole = {"source": "a.json", "target": "admnet_guided_upsampled_imagenet256.npz", "metric": "fid", "value": 3.94,
             "n": 50_000, "extractor": "inception-2015-12-05",
             "reference": "VIRTUAL_imagenet256_labeled.npz"}  # fmt: skip
    return Score(**{**whole, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"n": 10_000}, "N = 10,000, not 50,000"),
        ({"n": None}, "N = not recorded, not 50,000"),
        ({"extractor": "judge judge.pt"}, "extractor: judge judge.pt, not inception-2015-12-05"),
    ],
)
def test_scores_with_another_n_or_extractor_are_not_comparable(changes: dict[str, Any], reason: str | None) -> None:
    (beside,) = [one for one in scores.beside_published([], [adm(**changes)]) if one.score]
    assert beside.published.quoted == "3.943"
    assert beside.reasons == (() if reason is None else (reason,))


def test_every_published_figure_is_shown_even_where_nothing_was_run() -> None:
    found = scores.beside_published([], [])
    assert [one.published for one in found] == list(PUBLISHED)
    assert all(one.score is None for one in found)
    assert {p.value for p in PUBLISHED if p.metric == "parameters"} == {133e6, 310e6, 602e6}


def test_parameters_stand_beside_the_paper_at_its_depth_alone() -> None:
    sized = {"parameters": 311_800_000, "network.depth": 16}
    found = scores.beside_published([Item(stage="generator", name="g", settings=sized)], [])
    assert [(one.published.depth, one.reasons) for one in found if one.score] == [(16, ())]


def sweep(**options: Any) -> Score:
    return Score(source=f"{options}", target="t", metric="frechet_distance", value=5 + options["cfg"], n=8,
                 extractor="judge", reference="r", options=options)  # fmt: skip


def test_trade_offs_are_drawn_where_guidance_or_temperature_differ() -> None:
    found = scores.trade_offs([sweep(cfg=c, tau=tau) for tau in (1.0, 2.0) for c in (1.0, 0.0)])
    assert [(one.knob, sorted(one.curves)) for one in found] == [
        ("cfg", ["tau = 1", "tau = 2"]), ("tau", ["cfg = 0", "cfg = 1"])
    ]  # fmt: skip
    assert found[0].curves["tau = 1"] == [(0.0, 5.0, 0.0), (1.0, 6.0, 1.0)]
    assert scores.trade_offs([sweep(cfg=1.0, tau=1.0)]) == []


def test_scores_that_cannot_be_compared_share_no_trade_off() -> None:
    other = Score(**{**sweep(cfg=1.0, tau=1.0).__dict__, "n": 9})
    assert scores.trade_offs([sweep(cfg=0.0, tau=1.0), other]) == []


def test_the_best_is_named_among_comparable_rows_alone() -> None:
    other = Score(**{**sweep(cfg=-3.0, tau=1.0).__dict__, "n": 9})
    rows = scores.rows([sweep(cfg=0.0, tau=1.0), sweep(cfg=1.0, tau=1.0), other])
    assert [sorted(row.best) for row in rows] == [["frechet_distance"], [], []]


def record_of(**more: Any) -> dict[str, Any]:
    """What `rdpm eval fid --json` prints, in short."""
    judge, images = {"name": "judge judge.pt", "sha256": "a" * 64}, {"name": "digits:train", "sha256": "b" * 64}
    options = {"cfg": 1.0, "tau": 1.0, "schedule": "square"}
    known = {"metric": "frechet_distance", "value": 5.0, "n": 8, "extractor": judge, "reference": images}
    return {**known, "options": options, "checkpoint": "c" * 64, **more}


def test_the_best_is_not_named_across_judges_of_one_name_nor_across_rejection() -> None:
    other = record_of(value=1.0, extractor={"name": "judge judge.pt", "sha256": "d" * 64})
    chosen = record_of(value=2.0, options={"cfg": 1.0, "tau": 1.0, "reject": {"keep": 0.25, "judge": "judge.pt"}})
    records = {"a": record_of(), "b": record_of(value=6.0), "c": other, "d": chosen}
    rows = scores.rows([score for name, record in records.items() for score in scores.read(record, name)])
    assert [(row.source, sorted(row.best)) for row in rows if row.best] == [("a", ["frechet_distance"])]
    assert rows[2].extractor == "judge judge.pt (dddddddd)"
    assert rows[3].options["reject"] == "keep 0.25"


def test_points_of_two_checkpoints_share_no_curve() -> None:
    records = [
        record_of(options={"cfg": cfg, "tau": 1.0}, checkpoint=model * 64) for model in "cd" for cfg in (0.0, 1.0)
    ]
    (found,) = scores.trade_offs([one for i, record in enumerate(records) for one in scores.read(record, str(i))])
    assert sorted(found.curves) == ["checkpoint = cccccccc", "checkpoint = dddddddd"]
    assert [len(points) for points in found.curves.values()] == [2, 2]


# ---- other formats -------------------------------------------------------------------------------------------------


def test_json_holds_the_chain_the_scores_and_the_settings(made: Path, tmp_path: Path) -> None:
    assert run_cli(["eval", "report", *(str(made / p) for p in PARTS), "-o", str(tmp_path / "r.json"), "--quiet"]) == 0
    read = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    fid = files.read_json(made / "fid.json")
    (mine,) = [s for s in read["scores"] if s["metric"] == "frechet_distance"]
    assert (mine["value"], mine["n"]) == (fid["value"], fid["n"])
    generator = next(one for one in read["chain"] if one["stage"] == "generator")
    assert generator["settings"]["network.depth"] == 1
    assert {link["state"] for link in generator["made_from"]} == {"matches"}


def test_csv_has_a_row_a_score_and_a_row_a_setting(made: Path, tmp_path: Path) -> None:
    report(made, tmp_path / "report.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report.csv").read_text())))
    psnr = [row for row in rows if (row["table"], row["name"]) == ("score", "psnr")]
    assert [float(row["value"]) for row in psnr] == pytest.approx(
        [
            files.read_json(made / "recon" / "samples.json")["scores"]["psnr"],
            files.read_json(made / "recon.json")["psnr"],
        ]
    )
    assert [row["value"] for row in rows if (row["table"], row["name"]) == ("setting", "network.depth")] == ["1"]


def test_markdown_tables_keep_their_columns(made: Path, tmp_path: Path) -> None:
    report(made, tmp_path / "report.txt", form="md", title="a | b <i>")
    lines = (tmp_path / "report.txt").read_text().splitlines()
    assert lines[0] == "# a \\| b \\<i\\>"
    assert len([line for line in lines if line.startswith("## ")]) == 4
    tables = [[len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()]
              for block in "\n".join(lines).split("\n\n") if block.startswith("|")]  # fmt: skip
    assert len(tables) == 5  # two of scores
    assert all(len(set(table)) == 1 for table in tables)


def test_markdown_keeps_intervals_notes_and_what_was_not_computed(tmp_path: Path) -> None:
    record = {"metric": "all", "fid": 2.0, "fid_ci95": [1.5, 2.5], "fid_spread_over_subsets": 0.25, "n": 7,
              "sfid": None, "reference": {"name": "r"}, "notes": ["few | images"],
              "not_computed": {"sfid": "pooled"}}  # fmt: skip
    files.write_json(tmp_path / "score.json", record)
    engine.make_report([tmp_path / "score.json"], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "2.000 ± 0.25 (1.500 to 2.500)" in text
    assert "- few \\| images (" in text
    assert "- sFID not computed: pooled (" in text


# ---- pictures and plots --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3000, 900), (900, 3000), (1, 1), (3000, 1)])
def test_pictures_are_bounded(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    found = pictures.encode(Image.fromarray(noise), "title", "alt")
    assert len(found.data) <= pictures.MOST_BYTES
    assert found.size[0] <= pictures.WIDEST
    assert found.size[1] <= pictures.HIGHEST
    with Image.open(io.BytesIO(found.data)) as opened:
        assert (opened.size, f"image/{opened.format.lower() if opened.format else ''}") == (found.size, found.kind)


def test_a_strip_is_the_first_image_of_every_row_a_step_a_column(made: Path) -> None:
    found = pictures.strip(made / "samples" / "previews" / "steps.gif", "t", "a", 64, 3)
    with Image.open(made / "samples" / "previews" / "steps.gif") as opened:
        frame = opened.convert("RGB")
    assert found.size == (frame.width - 66, frame.height)  # two steps where three images were
    assert found.alt == "a"


def test_plots_are_the_same_each_time_and_follow_the_scheme() -> None:
    curves = {"a_$": ([1.0, 2.0, 3.0], [1.0, math.nan, 0.5]), "<b>": ([1.0, 2.0], [0.2, 0.1])}
    first, again = (plots.draw("title", curves, "step", log=True) for _ in range(2))
    assert first == again
    text = first.svg.decode()
    assert "prefers-color-scheme:dark" in text
    assert not re.search("#0[1-9]0[1-9]0[1-9]", text)
    assert "&lt;b&gt;" in text
    assert first.alt == "title. a_$: 1 at step 1 to 0.5 at 3; <b>: 0.2 at step 1 to 0.1 at 2."


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    curve = ([float(step) for step in range(100_000)], [float(step) for step in range(100_000)])
    assert len(plots.draw("t", {"long": curve}, "step").svg) < 30_000
    assert plots.draw("t", {"long": curve}, "step").alt.endswith("to 1e+05 at 99999.")


@pytest.mark.parametrize("line", [{}, {"heldout/accuracy": [0.5]}, {"heldout/accuracy": [], "heldout/baseline": []},
                                  {"heldout/accuracy": [0.5, 0.4], "heldout/baseline": [0.5]}])  # fmt: skip
def test_a_log_without_whole_accuracies_has_nothing_to_show_at_t(line: dict[str, Any]) -> None:
    assert plots.held_out(Item(stage="generator", name="g", log=(line,))) is None


def test_runs_of_one_kind_share_a_plot_of_their_losses() -> None:
    log = tuple({"step": step, "loss": 1.0 / step} for step in (1, 2))
    runs = [Item(stage="generator", name=name, log=log) for name in ("_a", "b")]
    both = plots.together(runs)
    assert both is not None
    assert "_a: 1 at step 1 to 0.5 at 2; b: 1 at step 1" in both.alt
    assert plots.together(runs[:1]) is None


def test_text_that_no_file_can_hold_is_replaced() -> None:
    assert clean("a\x00b\udcffc\x9f\ud83dé") == "a\ufffdb\ufffdc\ufffd\ufffdé"


# ---- what is refused -----------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


Spoil = Callable[[Path, Path], list[Path]]
REFUSED: dict[str, tuple[Spoil, type[RdpmError], str]] = {
    "no such path": (lambda t, m: [t / "none"], UsageError, "does not exist"),
    "an empty folder": (lambda t, m: [t], DataError, "is no folder that a report knows"),
    "a folder of images": (lambda t, m: [m / "images"], DataError, "is no folder that a report knows"),
    "another file": (lambda t, m: [write(t / "a.txt", "x")], DataError, "is no file that a report knows"),
    "other json": (lambda t, m: [write(t / "a.json", '{"loss": 1}')], DataError, "holds no scores"),
    "broken json": (lambda t, m: [write(t / "a.json", "{")], DataError, "cannot be read as JSON"),
    "a truncated model": (lambda t, m: [write(t / "a.pt", "PK")], DataError, "cannot be read as a checkpoint"),
    "the report itself": (lambda t, m: [write(t / "report.html", "x")], UsageError, "is one of what is reported"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_recognised_is_one_clear_error(what: str, made: Path, tmp_path: Path) -> None:
    spoil, kind, message = REFUSED[what]
    given = spoil(tmp_path, made)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=message) as caught:
        engine.make_report([made / "samples", *given], tmp_path / "report.html")
    assert caught.value.hint or what == "a truncated model"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("part", "spoiled"), [("samples", '{"samples": 3}'), ("gen", '{"plan": {}}')])
def test_folders_that_are_damaged_or_unfinished_are_named(part: str, spoiled: str, made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / part, tmp_path / part))
    write(folder / ("samples.json" if part == "samples" else "run.json"), spoiled)
    with pytest.raises(DataError, match=re.escape(str(folder))) as caught:
        engine.make_report([folder], tmp_path / "report.html")
    assert caught.value.hint


@pytest.mark.parametrize(("name", "code"), [("report", 2), ("report.pdf", 2), ("folder", 2), ("report.md", 0)])
def test_the_format_is_told_by_the_suffix(name: str, code: int, made: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert run_cli(["eval", "report", str(made / "recon.json"), "-o", str(tmp_path / name), "--quiet"]) == code


def test_what_overwrites_a_report_is_whole_or_absent(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "report.html", "before")
    monkeypatch.setattr("os.replace", partial(_fail, "disk"))
    with pytest.raises(OSError, match="disk"):
        report(made, out, ["recon.json"])
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert out.read_text() == "before"


def _fail(what: str, *_: object) -> None:
    raise OSError(what)
