"""tune-sampling: the search on a known function, and the command with a tiny generator and an untrained judge."""

from pathlib import Path

import pytest
from extractors import save_judge
from generators import save_generator
from processes import torchrun

from rdpm_cli.distributed import one_thread
from rdpm_cli.engine import tune
from rdpm_cli.engine.tune import Measure, Search, differing, tune_sampling
from rdpm_cli.errors import UsageError
from rdpm_cli.generator import registry
from rdpm_cli.generator.config import RDPMSampling, ResGenSampling, SamplingConfig


class Bowl:
    """A value with its minimum at cfg = 1, the cosine schedule, tau = 1.25 and skip_steps = 2; 4 cannot be used."""

    def __init__(self, slope: float = 0.0) -> None:
        self.measured: list[RDPMSampling] = []
        self.slope = slope  # of cfg, in addition

    def __call__(self, options: SamplingConfig) -> float | None:
        assert isinstance(options, RDPMSampling)
        self.measured.append(options)
        if options.skip_steps == 4:
            return None
        schedule = {"cosine": 0.0, "linear": 1.0}.get(options.cfg_schedule, 2.0) if options.cfg else 1.0
        value = abs(options.cfg - 1) + schedule + abs(options.tau - 1.25) + abs(options.skip_steps - 2)
        return value + self.slope * options.cfg


def search_of(folder: Path, measure: Measure, budget: int = 100, start: SamplingConfig | None = None) -> Search:
    return Search(start or RDPMSampling(), measure, budget, folder / "tried.json", {"n": 12})


def test_the_search_reaches_the_minimum_and_measures_nothing_twice(tmp_path: Path) -> None:
    bowl, start = Bowl(), RDPMSampling(tau=2.0)
    search = search_of(tmp_path, bowl, start=start)
    assert differing(search.run(), start) == "cfg=1.0 tau=1.25 cfg_schedule=cosine skip_steps=2"
    assert search.value == 0
    assert len({options.model_dump_json() for options in bowl.measured}) == len(bowl.measured)
    assert search.tried["as recorded"] == bowl(start)


@pytest.mark.parametrize("budget", [1, 5, 9])
def test_the_search_keeps_to_its_budget(tmp_path: Path, budget: int) -> None:
    search = search_of(tmp_path, Bowl(), budget)
    best = search.run()
    assert len(search.tried) == budget
    assert (best == RDPMSampling()) == (budget == 1)
    assert search.value == min(search.tried.values())


def test_schedules_are_not_tried_without_guidance(tmp_path: Path) -> None:
    bowl = Bowl(slope=9)
    search_of(tmp_path, bowl).run()
    assert {options.cfg_schedule for options in bowl.measured} == {"linear"}


def test_the_fields_of_resgen_are_searched(tmp_path: Path) -> None:
    def bowl(options: SamplingConfig) -> float:
        assert isinstance(options, ResGenSampling)
        return options.cfg + abs(options.top_p - 0.8) + abs(options.z_temp - 0.9) + abs(options.conf_temp - 2)

    search = search_of(tmp_path, bowl, start=ResGenSampling())
    assert differing(search.run(), ResGenSampling()) == "conf_temp=2.0 top_p=0.8 z_temp=0.9"
    assert search.value == 0


def test_an_interrupted_search_measures_the_rest_only(tmp_path: Path) -> None:
    bowl = Bowl()

    def interrupted(options: SamplingConfig) -> float | None:
        if len(bowl.measured) == 7:
            raise KeyboardInterrupt
        return bowl(options)

    with pytest.raises(KeyboardInterrupt):
        search_of(tmp_path, interrupted).run()
    best = search_of(tmp_path, bowl).run()
    (tmp_path / "whole").mkdir()
    reference = Bowl()
    assert best == search_of(tmp_path / "whole", reference).run()
    assert [o.model_dump() for o in bowl.measured] == [o.model_dump() for o in reference.measured]
    with pytest.raises(UsageError, match="n: 12 -> 13"):
        Search(RDPMSampling(), bowl, 100, tmp_path / "tried.json", {"n": 13})


def test_several_processes_are_refused(
    tmp_path: Path, tiny_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = save_generator(tmp_path / "generator.pt", tiny_tokenizer_file)
    for name, value in torchrun(2)[0].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="one process"):
        tune_sampling(ckpt, ref="digits", extractor=save_judge(tmp_path / "judge.pt"), device="cpu")


def test_the_tuned_file_is_the_same_model_with_new_defaults(
    tmp_path: Path, tiny_tokenizer_file: Path, image_folder: Path
) -> None:
    ckpt = save_generator(tmp_path / "generator.pt", tiny_tokenizer_file, micro_batch=4)
    judge, original = save_judge(tmp_path / "judge.pt"), registry.load(ckpt)

    def tuned(out: str | None, samples: int, budget: int) -> dict[str, object]:
        path, ref = tmp_path / out if out else None, str(image_folder)
        with one_thread():
            return tune_sampling(ckpt, path, samples=samples, budget=budget, ref=ref, extractor=judge).values

    values, written = tuned(None, 12, 6), registry.load(tmp_path / "generator-tuned.pt")
    tried = values["tried"]
    assert isinstance(tried, dict)
    assert values["digest"] == written.digest == original.digest
    assert (len(tried), list(tried.values())) == (6, sorted(tried.values()))
    assert (values["value"], values["before"]) == (min(tried.values()), tried["as recorded"])
    assert differing(written.sampling, original.sampling) == values["best"]
    assert written.provenance["tuned"]["n"] == 12
    assert tuned("b.pt", 12, 6)["tried"] == tried  # the same noise for every candidate, and in every search
    assert values["notes"] == [tune.NOTE]
    few = tuned("c.pt", 6, 1)["notes"]
    assert isinstance(few, list)
    assert len(few) == 2  # fewer images than features
    assert not list(tmp_path.glob("*.tried.json"))
    with pytest.raises(UsageError, match=r"generator-tuned\.pt"):
        tuned(None, 12, 6)
