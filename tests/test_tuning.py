"""tune-sampling: the search alone, and the whole with a tiny generator and an untrained judge."""

from pathlib import Path

import pytest
import torch
from generators import save_generator

from rdpm_cli import engine, modelfile
from rdpm_cli.config import RDPMSampling, ResGenSampling, SamplingConfig
from rdpm_cli.engine.tuning import Search, Tried, differing
from rdpm_cli.errors import UsageError
from rdpm_cli.evaluation import judge as judge_file
from rdpm_cli.generator import model
from rdpm_cli.threads import one_thread

# ---- the search ----------------------------------------------------------------------------------------------------


class Bowl:
    """A score with its bottom at cfg = 1, the cosine schedule, tau = 1.25 and skip_steps = 2; 4 cannot be used."""

    def __init__(self) -> None:
        self.asked: list[RDPMSampling] = []

    def __call__(self, options: SamplingConfig) -> float | None:
        assert isinstance(options, RDPMSampling)
        self.asked.append(options)
        if options.skip_steps == 4:
            return None
        schedule = {"cosine": 0.0, "linear": 1.0}.get(options.cfg_schedule, 2.0) if options.cfg else 1.0
        return abs(options.cfg - 1) + schedule + abs(options.tau - 1.25) + abs(options.skip_steps - 2)


def test_the_search_finds_the_bottom_and_asks_nothing_twice() -> None:
    score = Bowl()
    search = Search(score, 100)
    best = search.run(RDPMSampling(tau=2.0))
    assert isinstance(best, RDPMSampling)
    assert (best.cfg, best.cfg_schedule, best.tau, best.skip_steps) == (1.0, "cosine", 1.25, 2)
    assert search.value == 0
    assert len({options.model_dump_json() for options in score.asked}) == len(score.asked)
    assert search.found["as recorded"] == score(RDPMSampling(tau=2.0))


@pytest.mark.parametrize("budget", [1, 5, 9])
def test_the_search_keeps_to_its_budget(budget: int) -> None:
    search = Search(Bowl(), budget)
    best = search.run(RDPMSampling())
    assert len(search.found) == budget
    assert (best == RDPMSampling()) == (budget == 1)
    assert search.value == min(search.found.values())


def test_schedules_are_not_tried_without_guidance() -> None:
    score = Bowl()
    Search(lambda options: (score(options) or 0.0) + 9 * options.cfg, 100).run(RDPMSampling())
    assert {options.cfg_schedule for options in score.asked} == {"linear"}


def test_resgen_is_searched_over_what_its_mixtures_have() -> None:
    def bowl(options: SamplingConfig) -> float:
        assert isinstance(options, ResGenSampling)
        return options.cfg + abs(options.top_p - 0.8) + abs(options.z_temp - 0.9) + abs(options.conf_temp - 2)

    search = Search(bowl, 100)
    best = search.run(ResGenSampling())
    assert differing(best, ResGenSampling()) == "top_p=0.8 z_temp=0.9 conf_temp=2.0"
    assert search.value == 0


def test_what_differs_is_named() -> None:
    assert differing(RDPMSampling(cfg=1.5, tau=2.0), RDPMSampling(tau=2.0)) == "cfg=1.5"
    assert differing(RDPMSampling(), RDPMSampling()) == "as recorded"


def test_a_search_that_was_stopped_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, score = {"n": 12}, Bowl()
    before = Tried(tmp_path / "tried.json", plan)
    Search(lambda options: before.score(options, score), 7).run(RDPMSampling())
    asked = len(score.asked)
    after = Tried(tmp_path / "tried.json", plan)
    assert f"{asked} candidates are there" in capsys.readouterr().err
    search = Search(lambda options: after.score(options, score), 100)
    best = search.run(RDPMSampling())
    assert best == Search(Bowl(), 100).run(RDPMSampling())
    assert len({options.model_dump_json() for options in score.asked}) == len(score.asked)
    with pytest.raises(UsageError, match="n: 12 -> 13"):
        Tried(tmp_path / "tried.json", {"n": 13})
    after.done()
    assert list(tmp_path.iterdir()) == []


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_tuned_file_is_the_same_model_with_other_defaults(
    tmp_path: Path, tiny_tokenizer_file: Path, image_folder: Path
) -> None:
    with torch.random.fork_rng(), one_thread():
        torch.manual_seed(3)
        network = judge_file.Judge(16, 8, 4, 3)
        judge = tmp_path / "judge.pt"
        modelfile.save(judge, judge_file.pack(network, list("abc"), provenance={"heldout_accuracy": 0.5}))
        ckpt = save_generator(tmp_path / "generator.pt", tiny_tokenizer_file, micro_batch=4)
        result = engine.tune_sampling(ckpt, samples=12, budget=6, ref=str(image_folder), extractor=judge, device="cpu")
        again = engine.tune_sampling(
            ckpt, tmp_path / "b.pt", samples=12, budget=6, ref=str(image_folder), extractor=judge, device="cpu"
        )
        few = engine.tune_sampling(
            ckpt, tmp_path / "c.pt", samples=4, budget=1, ref=str(image_folder), extractor=judge, device="cpu"
        )
    tuned = model.load(tmp_path / "generator-tuned.pt")
    values = result.values
    assert values["digest"] == tuned.digest == model.load(ckpt).digest
    assert len(values["tried"]) == 6
    assert list(values["tried"].values()) == sorted(values["tried"].values())
    assert values["value"] == min(values["tried"].values()) <= values["before"]
    assert differing(tuned.sampling, model.load(ckpt).sampling) == values["best"]
    assert tuned.provenance["tuned"]["n"] == 12
    assert again.values["tried"] == values["tried"]
    assert len(values["notes"]) == 1
    assert "fewer images than the 4 features" in few.values["notes"][1]
    assert not list(tmp_path.glob("*.tried.json"))
    with pytest.raises(UsageError, match=r"generator-tuned\.pt is there already"):
        engine.tune_sampling(ckpt, samples=12, extractor=judge, device="cpu")
