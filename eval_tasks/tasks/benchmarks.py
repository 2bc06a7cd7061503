"""The drawing benchmarks by task name."""

from dataclasses import replace

from eval_tasks.judging.judge_run import Benchmark
from eval_tasks.judging.options import JudgeOptions
from eval_tasks.tasks.dpg_bench import task as dpg_bench
from eval_tasks.tasks.genai_bench import task as genai_bench
from eval_tasks.tasks.geneval import task as geneval
from eval_tasks.tasks.geneval_scenes.prompts import documents


def _on_scenes(options: JudgeOptions) -> JudgeOptions:
    return replace(options, detector=options.detector or geneval.SCENES)


# lmms-eval scores this benchmark with its own task; it is listed here so that `evotok-eval judge` can judge its images.
GENEVAL_SCENES = Benchmark(
    name="geneval_scenes",
    overall="skills",
    num_images=4,
    documents=documents,
    find_judges=lambda options: geneval.find_judges(_on_scenes(options)),
    open_judge=lambda options: geneval.open_judge(_on_scenes(options)),
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (geneval.BENCHMARK, genai_bench.BENCHMARK, dpg_bench.BENCHMARK, GENEVAL_SCENES)
}
