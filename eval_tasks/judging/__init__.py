"""Judging of drawn images: rules, detectors, the color classifier, the VQA judge, scores and reports.

The contract with a drawing model of lmms-eval, of either interface: a request has `modality: image` and `num_images` in
its `generation_kwargs`, and the answer is `{"text": "", "images": [path, ...]}` as JSON. Every path must be readable by
Pillow and must exist until the run is scored. Nothing else is required of a model.

Drawing and judging are separate steps: the images of a run are stored in a folder together with their prompts
(`drawn_run`), and the folder is judged (`judge_run`), immediately or later. Within lmms-eval,
`eval_tasks.tasks.judged_task` combines both steps.
"""
