"""Search of drawing settings: images, statistics, rounds of successive halving, and the choice of the best."""

import math
from statistics import stdev

import pytest

from evotok_plugin import SamplingOptions
from evotok_plugin.errors import UserError
from llava_ext.data.prompt_files import Prompt
from llava_ext.generation import DrawingOptions
from llava_ext.tuning.candidates import CURRENT, Candidate, read_candidates, search_space
from llava_ext.tuning.scores import Result, make_jobs
from llava_ext.tuning.search import choose, count_images, plan_rounds, search
from llava_ext.tuning.table import as_table


def candidate(name, scale=2.0, interval=(0, 1)):
    return Candidate(name, DrawingOptions(scale, guidance_interval=interval).completed())


def result(one, scores):
    return Result(one, ("a", "b") * (len(scores) // 2), tuple(scores))


def test_images_alternate_between_skills_and_keep_their_seeds():
    prompts = [Prompt("a1", "a"), Prompt("a2", "a"), Prompt("b1", "b")]
    jobs = make_jobs(prompts, 2, seed=10)
    assert [job.prompt.text for job in jobs] == ["a1", "b1", "a2"] * 2
    assert [job.seed for job in jobs] == [10, 11, 12, 13, 14, 15]
    assert make_jobs(prompts, 3, seed=10)[:6] == jobs


def test_the_overall_score_weighs_skills_equally():
    one = Result(candidate("x"), ("a", "a", "a", "a", "b", "b"), (1, 0, 1, 1, 0, 1))
    assert one.skills == {"a": 0.75, "b": 0.5} and one.overall == 0.625
    expected = math.sqrt(stdev([1, 0, 1, 1]) ** 2 / 4 + stdev([0, 1]) ** 2 / 2) / 2
    assert one.standard_error == pytest.approx(expected)
    assert math.isnan(Result(candidate("x"), ("a", "b", "b"), (1, 0, 1)).standard_error)


@pytest.mark.parametrize("num_candidates", [1, 2, 4, 5, 50])
@pytest.mark.parametrize("num_images", [12, 100, 480])
def test_rounds_double_the_images_and_halve_the_candidates(num_candidates, num_images):
    rounds = plan_rounds(num_candidates, num_images, least=12)
    assert rounds[0].num_candidates == num_candidates and rounds[-1].num_candidates <= 4
    assert rounds[0].num_images >= 12 and rounds[-1].num_images == num_images
    for before, after in zip(rounds, rounds[1:], strict=False):
        assert after.num_candidates == -(-before.num_candidates // 2)
        assert before.num_images <= after.num_images <= 2 * before.num_images


def test_a_search_finds_the_best_candidate_and_draws_what_was_planned():
    candidates = [candidate(CURRENT, 3.0), candidate("plain", 1.0), candidate("plain too", 1.0)]
    candidates += [candidate(f"c{n}") for n in range(20)]
    quality = {one: 0.9 if one.name == "c13" else 0.1 if one.name == CURRENT else 0.5 for one in candidates}
    drawn = {}

    def evaluate(one, num_images):
        drawn[one] = num_images
        return result(one, [quality[one], quality[one] + 1e-3 * (one.name == "plain too")] * (num_images // 2))

    rounds = plan_rounds(len(candidates), 160, least=4)
    outcome = search(candidates, rounds, evaluate)
    assert outcome.best.candidate.name == "c13"
    names = [one.candidate.name for one in outcome.finalists]
    assert names[0] == "c13" and names[-1] == CURRENT and "plain too" in names and len(names) == 3
    assert all(drawn[one.candidate] == 160 for one in outcome.finalists)
    assert sum(drawn.values()) == count_images(rounds) < 0.4 * 160 * len(candidates)
    everyone = [one.candidate.name for one in (*outcome.finalists, *outcome.dropped)]
    assert sorted(everyone) == sorted(one.name for one in candidates)


def test_ties_go_to_the_setting_that_costs_least():
    plain, early, full = candidate("plain", 1.0), candidate("early", interval=(0, 0.5)), candidate("full")
    noisy = [1, 0, 1, 1, 1, 1, 1, 0]  # 0.75, standard error 0.16
    assert choose([result(plain, [0.7] * 8), result(early, [0.72] * 8), result(full, noisy)]).candidate is plain
    assert choose([result(plain, [0.5] * 8), result(early, [0.7] * 8), result(full, noisy)]).candidate is early
    assert choose([result(plain, [0.5] * 8), result(early, [0.5] * 8), result(full, noisy)]).candidate is full
    other = candidate("other", 1.0)
    assert choose([result(plain, [0.70] * 8), result(other, [0.71] * 8), result(full, noisy)]).candidate is other


def test_the_default_candidates_start_with_the_current_settings():
    current = DrawingOptions(1.75, "constant", "", SamplingOptions(0.5, 9, 1.0, 0.2)).completed()
    space = search_space(current, num_levels=4)
    assert space[0] == Candidate(CURRENT, current) and len(space) > 40
    assert len({one.name for one in space}) == len({one.options for one in space}) == len(space)
    assert all(one.options.sampling.top_k == 9 for one in space)
    assert {one.cost for one in space} == {0.0, 0.125, 0.25, 0.5, 1.0}
    per_level = {one.options.guidance_scale for one in space if isinstance(one.options.guidance_scale, tuple)}
    assert per_level == {(scale, scale, 1.0, 1.0) for scale in (1.5, 2.0, 3.0)}
    assert len(search_space(current, num_levels=1)) == len(space) - 6
    # The current settings are not drawn twice.
    grid = {"guidance_scale": 1.0, "sampling": SamplingOptions(1.0, 0, 1.0, 0.0)}
    assert len(search_space(DrawingOptions(**grid).completed(), 4)) == len(space) - 1


def test_candidates_of_a_file_override_the_current_settings(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("plain: {guidance_scale: 1}\nsame: {temperature: 0.5}\nearly: {guidance_interval: [0, 0.5]}\n")
    current = DrawingOptions(2.0, temperature=0.5).completed()
    read = read_candidates(path, current)
    assert [one.name for one in read] == [CURRENT, "plain", "early"]
    assert read[1].options == DrawingOptions(1, temperature=0.5).completed()
    assert read[2].options == DrawingOptions(2.0, temperature=0.5, guidance_interval=(0, 0.5)).completed()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected lines such as"),
        ("- {guidance_scale: 1}", "expected 'key: value' lines"),
        ("a: {guidence_scale: 1}", "a: .*unknown setting 'guidence_scale'; did you mean 'guidance_scale'"),
        ("a: {guidance_scale: 0}", "a: .*guidance_scale must be at least 1"),
        ("a: 3", "a: .*expected a mapping"),
    ],
)
def test_invalid_files_of_candidates_are_reported(tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_candidates(path, DrawingOptions().completed())


def test_the_table_has_a_column_per_skill():
    plain = result(candidate("plain", 1.0), [1, 0, 1, 1])
    few = Result(candidate("strong"), ("a", "b"), (0.5, 1.0))
    lines = as_table([plain, few]).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["settings", "images", "a", "b", "overall"]
    error = plain.standard_error
    assert [cell.strip() for cell in lines[2].strip("|").split("|")][2:] == ["1.000", "0.500", f"0.750 ± {error:.3f}"]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")][1:] == ["2", "0.500", "1.000", "0.750"]
    assert len({len(line) for line in lines}) == 1
