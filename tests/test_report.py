"""`rdpm eval report`: what it reads, how scores are compared, a page that needs nothing else."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from extractors import pixels, save_judge
from PIL import Image

from rdpm_cli import files
from rdpm_cli.engine import baselines, recon, report, sample, score
from rdpm_cli.engine import generator as generator_engine
from rdpm_cli.engine import tokenizer as tokenizer_engine
from rdpm_cli.errors import DataError, UsageError
from rdpm_cli.runs import Result

CLASSES = ["<script>", "b&b"]  # names that a page must escape
TOKENIZER = [
    "autoencoder.width=8", "autoencoder.channels=8", "autoencoder.res_blocks=1", "quantizer.codes=64",
    "quantizer.steps=2", "train.steps=2", "train.batch=16", "train.log_every=1", "train.eval_every=2",
]  # fmt: skip
GENERATOR = ["network.depth=1", "train.steps=2", "train.batch=16", "train.log_every=1", "train.eval_every=2"]
VOID = {"meta", "img", "br", "hr", "link", "input"}
PARTS = ["tok", "codes", "gen", "judge.pt", "samples", "recon", "fid.json", "recon.json"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole chain, tiny: images of two classes, tok/, codes/, gen/, judge.pt, samples/, recon/, two score files."""
    root = tmp_path_factory.mktemp("report")
    for number, name in enumerate(CLASSES):
        (root / "images" / name).mkdir(parents=True)
        for index, image in enumerate(pixels(8, number)):
            Image.fromarray(image).save(root / "images" / name / f"{index}.png")
    images = str(root / "images")
    tokenizer_engine.train_tokenizer(images, root / "tok", "digits", TOKENIZER, device="cpu")
    tokenizer_engine.tokenize(images, root / "codes", root / "tok" / "tokenizer.pt", device="cpu")
    generator_engine.train_gen(root / "codes", root / "gen", "digits", GENERATOR, device="cpu")
    outputs = sample.Outputs(gif=True)
    sample.sample(root / "gen" / "generator.pt", per_class=3, out=root / "samples", outputs=outputs, device="cpu")
    tokenizer_engine.reconstruct(images, root / "recon", root / "tok" / "tokenizer.pt", device="cpu")
    options: Any = {"extractor": save_judge(root / "judge.pt"), "device": "cpu"}
    files.write_json(root / "fid.json", score.eval_images("fid", str(root / "samples"), **options).values)
    result = recon.eval_recon(images, root / "tok" / "tokenizer.pt", seeds=2, **options)
    files.write_json(root / "recon.json", result.values)
    return root


def write(chain: Path, out: Path, parts: list[str] = PARTS, **options: Any) -> Result:
    return report.make_report([chain / part for part in parts], out, **options)


class Page(HTMLParser):
    """The start tags of a page with their attributes; every tag must be closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_escapes_names_and_refers_to_nothing_outside(chain: Path, tmp_path: Path) -> None:
    result = write(chain, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    for _, attributes in page.tags:
        assert all(attributes.get(name, "#").startswith(("#", "data:image/")) for name in ("src", "href"))
    assert not re.search(r"@import|url\(|<script|<link|<iframe", text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) >= 4
    assert all(len(image["alt"]) > 5 for image in images)
    assert result.values["items"] == len(PARTS)
    assert result.values["scores"] > 4


def test_a_digest_that_was_given_too_is_shown_by_its_name(chain: Path) -> None:
    items = report.read_items([chain / part for part in PARTS])
    assert [item.stage for item in items] == sorted((item.stage for item in items), key=report.STAGES.index)
    by_stage = {item.stage: item for item in items}
    for stage, origin in {"store": "tokenizer", "generator": "store", "samples": "generator"}.items():
        assert by_stage[stage].made_from[origin] == by_stage[origin].digest


@pytest.mark.parametrize("form", ["html", "md", "json"])
def test_the_format_follows_the_suffix_or_the_option_and_repeats_byte_for_byte(
    chain: Path, tmp_path: Path, form: str
) -> None:
    write(chain, tmp_path / f"a.{form}")
    write(chain, tmp_path / "b", form=form)
    assert (tmp_path / f"a.{form}").read_bytes() == (tmp_path / "b").read_bytes()


def test_json_holds_every_score_as_it_was_recorded(chain: Path, tmp_path: Path) -> None:
    record = json.loads((chain / "fid.json").read_text())
    write(chain, tmp_path / "r.json")
    whole = json.loads((tmp_path / "r.json").read_text())
    assert {item["stage"] for item in whole["chain"]} == set(report.STAGES)
    tables = report.published_tables([], [])
    assert [table["source"] for table in whole["published"]] == [table["source"] for table in tables]
    assert [table["rows"] for table in whole["published"]] == [table["rows"] for table in tables]
    (second,) = (table for table in whole["published"] if "Table 2" in table["source"])
    assert {row["source"] for row in second["ours"]} == {str(chain / name) for name in ("recon", "recon.json")}
    (score,) = (x for x in whole["scores"] if x["metric"] == "frechet_distance" and x["source"].endswith("fid.json"))
    assert (score["value"], score["n"]) == (record["value"], record["n"])


def scores_of(*records: dict[str, Any]) -> list[report.Score]:
    return report.read_scores([report.Item("score", "a", record=record) for record in records])


def test_the_best_is_marked_among_comparable_scores_only() -> None:
    alike = [{"metric": "fid", "value": v, "n": 100, "extractor": {"name": "inception"}} for v in (3.0, 2.0)]
    assert [score.best for score in scores_of(*alike)] == [False, True]
    assert not any(score.best for score in scores_of(alike[0], {**alike[1], "n": 200}))


def test_each_row_of_eval_baselines_is_a_target_with_scores(chain: Path, tmp_path: Path) -> None:
    options: Any = {"extractor": chain / "judge.pt", "device": "cpu", "per_class": 5}
    values = baselines.eval_baselines(
        str(chain / "images"), chain / "tok/tokenizer.pt", seeds=range(2), **options
    ).values
    files.write_json(tmp_path / "baselines.json", values)
    scores = report.read_scores(report.read_items([tmp_path / "baselines.json"]))
    names = {f"{name}: {row['images']}" for name, row in values["rows"].items()}
    assert {score.target for score in scores} == names
    row = values["rows"]["gaussian"]
    score = next(s for s in scores if s.target == f"gaussian: {row['images']}" and s.metric == "frechet_distance")
    expected = (row["frechet_distance"]["mean"], row["frechet_distance"]["std"], 10)
    assert (score.value, score.spread, score.n) == expected
    assert score.extractor.startswith("judge judge.pt")


def test_a_score_over_seeds_has_its_spread_and_validity_a_label() -> None:
    several = {"metric": "fid", "value": 3.0, "spread_over_seeds": {"value": 0.5, "validity": 0.1}, "validity": 20.0}
    assert [(score.metric, score.spread) for score in scores_of(several)] == [("fid", 0.5), ("validity", 0.1)]


def test_absent_scores_say_why_and_have_no_row_next_to_published_ones() -> None:
    scores = scores_of({"rfid": None, "psnr": 22.0, "not_computed": {"rfid": "weights absent"}})
    by_metric = {score.metric: score for score in scores}
    assert (by_metric["rfid"].value, by_metric["rfid"].note) == (None, "weights absent")
    assert by_metric["psnr"].text == "22"
    assert [row["values"] for table in report.published_tables([], scores) for row in table["ours"]] == [{"psnr": 22.0}]


def test_published_values_are_as_printed_and_found_once_by_table_row_and_metric() -> None:
    figures = report.read_published()
    assert all(re.fullmatch(r"(\d{1,3}(,\d{3})+|\d*(\.\d+)?)[MB]?", figure["value"]) for figure in figures)
    places = [(f["table"], f["row"], f["metric"]) for f in figures if "table" in f]
    assert len(places) == len(set(places))
    assert {table for table, _, _ in places} == set("12345")


def test_every_published_figure_of_images_is_in_the_table_of_its_source() -> None:
    tables = {table["source"]: table for table in report.published_tables([], [])}
    figures = [figure for figure in report.read_published() if "task" not in figure]
    for figure in figures:
        table = tables[figure["source"]]
        (row,) = (row for row in table["rows"] if row["name"] == figure.get("row", figure["name"]))
        assert row["values"][figure["metric"]] == figure["value"]
        assert figure["metric"] in table["columns"]
        assert figure.get("note", "") in row["note"]
    count = sum(name not in report.SETTINGS for t in tables.values() for row in t["rows"] for name in row["values"])
    assert count == len(figures)
    (second,) = (table for source, table in tables.items() if "Table 2" in source)
    assert second["columns"] == ["weight", "bias", "T", "rfid", "ssim", "psnr"]


PAPERS: dict[str, Any] = {
    "metric": "all", "fid": 4.0, "precision": 0.83, "n": 50000, "target": {"name": "samples"},
    "reference": {"name": "VIRTUAL_imagenet256_labeled.npz"}, "extractor": {"name": "inception-2015-12-05"},
    "options": {"cfg": 1.5, "cfg_schedule": "linear"},
}  # fmt: skip


def ours_in(table: str, *records: dict[str, Any], items: list[report.Item] | None = None) -> list[dict[str, Any]]:
    """Our rows in the published table whose source has this text."""
    tables = report.published_tables(items or [], scores_of(*records))
    (rows,) = (t["ours"] for t in tables if table in t["source"])
    return list(rows)


@pytest.mark.parametrize("guidance", [{"cfg": 1.5, "cfg_schedule": "constant"}, {"cfg": 0.0}, None])
def test_a_score_that_shares_what_a_row_of_the_paper_states_can_be_compared(guidance: dict[str, Any] | None) -> None:
    (row,) = ours_in("Table 3", PAPERS, {"metric": "kid", "value": 0.1})
    assert (row["values"], row["reasons"]) == ({"fid": 4.0, "precision": 0.83}, [])
    assert ours_in("Table 3", {**PAPERS, "options": guidance})[0]["reasons"] == []


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        ({"reference": {"name": "digits"}}, ("data", "digits", "imagenet")),
        ({"n": 10000}, ("N", "10000", "50000")),
        ({"extractor": {"name": "judge a.pt"}}, ("extractor", "judge a.pt", "inception-2015-12-05")),
        ({"options": {"cfg": 1.5, "cfg_schedule": "cosine"}}, ("guidance", "cosine", "linear")),
        ({"options": {**PAPERS["options"], "reject": {"keep": 0.5}}}, ("reject",)),
    ],
)
def test_the_one_thing_that_differs_is_the_one_reason(change: dict[str, Any], tokens: tuple[str, ...]) -> None:
    (row,) = ours_in("Table 3", {**PAPERS, **change})
    (reason,) = row["reasons"]
    assert all(token in reason for token in tokens)


def test_the_figures_of_a_set_of_images_are_those_of_these_images_only() -> None:
    adm = {**PAPERS, "target": {"name": "admnet_guided_upsampled_imagenet256.npz"}, "options": None}
    assert [row["reasons"] for row in ours_in("ADM", adm)] == [[]]
    (row,) = ours_in("ADM", {**PAPERS, "options": None})
    assert len(row["reasons"]) == 1


def test_what_a_source_does_not_state_and_the_range_of_a_psnr_are_reasons() -> None:
    (row,) = ours_in("Table 4", PAPERS)
    assert ["guidance" in reason for reason in row["reasons"]] == [True]
    of_tokenizer = {"psnr": 30.0, "ssim": 0.6, "n": 50000, "reference": {"name": "imagenet/val"}}
    (row,) = ours_in("Table 2", of_tokenizer)
    assert ["N" in row["reasons"][0], "6.02 dB" in row["reasons"][1], len(row["reasons"])] == [True, True, 2]
    (row,) = ours_in("Table 2", {name: value for name, value in of_tokenizer.items() if name != "psnr"})
    assert not any("6.02 dB" in reason for reason in row["reasons"])


def test_generators_are_compared_with_published_sizes_of_their_depth() -> None:
    items = [report.Item("generator", f"d{depth}", facts={"depth": depth, "parameters": 5}) for depth in (12, 13)]
    same, other = ours_in("Table 1", items=[*items, report.Item("generator", "unfinished")])
    assert (same["values"], same["reasons"]) == ({"parameters": 5}, [])
    assert [("13" in reason) for reason in other["reasons"]] == [True]
    assert ours_in("Table 5", items=items) == []


def test_tables_without_ours_are_folded_and_rows_that_cannot_be_compared_are_grey() -> None:
    scores = scores_of(PAPERS, {**PAPERS, "n": 10000}, {**PAPERS, "n": 20000})
    page = report.as_html("title", [], scores)
    section = page[page.index('id="published"') :]
    details = [a for tag, a in Page(page).tags if tag == "details"]
    ours = [bool(table["ours"]) for table in report.published_tables([], scores)]
    assert ["open" in attributes for attributes in details] == ours
    assert {True, False} == set(ours)
    third, fourth = (section[section.index(f"Table {n}") : section.index(f"Table {n + 1}")] for n in (3, 4))
    assert third.count('class="incomparable"') == 2
    assert fourth.count('class="incomparable"') == 3
    assert fourth.count("guidance") == 1


def test_held_out_accuracies_are_shown() -> None:
    page = report.as_html("title", [report.Item("generator", "gen", held_out=[(0.75, 0.5)])], [])
    assert all(f'<td class="number">{text}</td>' in page for text in ("0.750", "0.500", "0.250"))


def test_the_sheet_of_a_score_is_on_the_page_while_it_is_there(tmp_path: Path) -> None:
    sheet = tmp_path / "pairs.png"
    Image.fromarray(pixels(1, 0)[0]).save(sheet)
    files.write_json(tmp_path / "memory.json", {"metric": "memory", "fid": 1.0, "sheet": str(sheet)})
    (item,) = report.read_items([tmp_path / "memory.json"])
    images = [attributes for tag, attributes in Page(report.as_html("title", [item], [])).tags if tag == "img"]
    assert [str(tmp_path / "memory.json") in image["alt"] for image in images] == [True]
    sheet.unlink()
    assert report.read_items([tmp_path / "memory.json"])[0].pictures == []


def test_the_chain_comes_first_and_the_settings_last(chain: Path, tmp_path: Path) -> None:
    write(chain, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert (sections[0], sections[-1]) == ("chain", "settings")


def test_bad_inputs_are_refused_by_name(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, error in {"x.json": DataError, "empty": DataError, "absent": UsageError}.items():
        with pytest.raises(error, match=name):
            report.make_report([tmp_path / name])
    for out, token in {chain / "fid.json": "fid.json", tmp_path / "r.txt": ".txt"}.items():
        with pytest.raises(UsageError, match=token):
            report.make_report([chain / "fid.json"], out)


def test_the_held_out_row_of_eval_memory_and_perturbed_codes_are_told_apart() -> None:
    record = {"near_copies": 0.5, "target": {"name": "samples"}, "n": 8}
    scores = scores_of({**record, "heldout": {"near_copies": 0.0, "name": "val", "count": 4}})
    assert {(score.target, score.value, score.n) for score in scores} == {("samples", 0.5, 8), ("val", 0.0, 4)}
    pair = [
        {"metric": "reconstruction", "psnr": v, "n": 8, "options": o} for v, o in ((9.0, {"perturb": 0.5}), (8.0, {}))
    ]
    assert not any(score.best for score in scores_of(*pair))
