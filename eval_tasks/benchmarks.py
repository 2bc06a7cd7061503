"""The drawing benchmarks by the name of their task."""

from dataclasses import replace

from eval_tasks import dpg_bench, genai_bench, geneval
from eval_tasks.judging.benchmark import Benchmark
from eval_tasks.judging.options import JudgeOptions


def _on_scenes(options: JudgeOptions) -> JudgeOptions:
    return replace(options, detector=options.detector or geneval.SCENES)


# Scored by its own task in lmms-eval; here so that its images can be judged again by themselves.
GENEVAL_SCENES = Benchmark(
    name="geneval_scenes",
    overall="skills",
    find_judges=lambda options: geneval.find_judges(_on_scenes(options)),
    open_judge=lambda options: geneval.open_judge(_on_scenes(options)),
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (geneval.BENCHMARK, genai_bench.BENCHMARK, dpg_bench.BENCHMARK, GENEVAL_SCENES)
}
